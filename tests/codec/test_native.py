"""The border to compiled code: everything is checked before an address is passed, and its absence is said."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from codec_cases import native_decode_sum, native_encode, same, tensor
from torch import Tensor

from flashcomm_megatron.codec import Microscaling, Uniform
from flashcomm_megatron.codec import native as compiled

ROOT = Path(__file__).resolve().parents[2]
CODEC = Uniform(4, 32)
BYTES = CODEC.wire_bytes(100)


def payload(size: int = BYTES) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


@pytest.mark.skipif(os.environ.get("FLASH_COMM_EXTENSION") == "0", reason="FLASH_COMM_EXTENSION=0")
def test_the_extension_was_built() -> None:
    assert compiled.available(), f"the compiled codec is {compiled.reason()}"


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.zeros(100, dtype=torch.float64), payload(), "x is torch.float64; expected torch.float32 or"),
        (torch.zeros(100, dtype=torch.int32), payload(), "x is torch.int32"),
        (torch.zeros(10, 10).T, payload(), r"x has shape \(10, 10\), strides \(1, 10\); expected contiguous"),
        (torch.zeros(200)[::2], payload(), r"x has shape .* strides \(2,\)"),
        (torch.zeros(100), payload().char(), "out is torch.int8; expected torch.uint8"),
        (torch.zeros(100), payload(BYTES - 1), f"out has {BYTES - 1} bytes; the codec's payload has {BYTES}"),
        (torch.zeros(100), payload(2 * BYTES)[::2], r"out has shape .* strides \(2,\)"),
        (torch.zeros(100), payload().to("meta"), "out is on meta; expected cpu"),
    ],
)
def test_encode_refuses_wrong_tensors(x: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"encode: {message}"):
        native_encode(CODEC, x, out)


def test_rows_that_nobody_has_named_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encode: x has shape \(10, 10\), strides \(10, 1\); expected contiguous 1-D"):
        CODEC.encode(torch.zeros(10, 10))
    with pytest.raises(ValueError, match=r"decode_sum: out has shape \(10, 10\)"):
        CODEC.decode_sum([payload()], torch.zeros(10, 10))


def test_a_payload_is_written_into_as_many_bytes() -> None:
    with pytest.raises(ValueError, match=f"encode: out has {BYTES + 1} bytes; the codec's payload has {BYTES}"):
        CODEC.encode(torch.zeros(100), payload(BYTES + 1))


@pytest.mark.parametrize(
    ("payloads", "out", "message"),
    [
        ([], torch.zeros(100), "no payloads found; give at least one"),
        ([payload()], torch.zeros(100, dtype=torch.complex64), "out is torch.complex64"),
        ([payload()], torch.zeros(10, 10).T, r"out has shape \(10, 10\)"),
        ([payload()], torch.zeros(200)[::2], r"out has shape .* strides \(2,\)"),
        ([payload(), payload(BYTES - 16)], torch.zeros(100), f"payload has {BYTES - 16} bytes"),
        ([payload(), payload().int()], torch.zeros(100), "payload is torch.int32; expected torch.uint8"),
        ([payload().to("meta")], torch.zeros(100), "payload is on meta; expected cpu"),
    ],
)
def test_decode_sum_refuses_wrong_tensors(payloads: list[Tensor], out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"decode_sum: {message}"):
        native_decode_sum(CODEC, payloads, out)


def test_unknown_devices_and_codecs_are_left_to_the_reference() -> None:
    assert not native_encode(CODEC, torch.zeros(100, device="meta"), payload().to("meta"))
    assert not native_decode_sum(CODEC, [payload().to("meta")], torch.zeros(100, device="meta"))
    stranger = Microscaling("e2m1", 32)
    sent = payload(stranger.wire_bytes(100))
    assert not native_encode(stranger, torch.zeros(100), sent)
    assert not native_decode_sum(stranger, [sent], torch.zeros(100))


def test_without_extension_the_reference_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensor("strange", 1000, torch.float16)

    def results() -> tuple[Tensor, Tensor]:
        sent = CODEC.encode(x)
        return sent, CODEC.decode_sum([sent, sent], torch.empty_like(x))

    fast = results()
    monkeypatch.setattr(compiled, "_extension", None)
    monkeypatch.setattr(compiled, "_reason", "not built: run pip install -e .")
    reference = results()
    assert torch.equal(fast[0], reference[0]) and same(fast[1], reference[1])
    assert not compiled.available() and compiled.info() == {}
    assert compiled.describe() == "PyTorch codec (not built: run pip install -e .)"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'flashcomm_megatron._C'"), "not built: run pip install -e ."),
        (ImportError("_C.so: wrong ELF class"), "cannot be loaded, run pip install -e . again: _C.so: wrong ELF class"),
    ],
)
def test_the_reason_for_a_missing_extension_is_kept(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, reason: str
) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    monkeypatch.delenv("FLASH_COMM_EXTENSION", raising=False)
    monkeypatch.setattr(importlib, "import_module", fail)
    assert compiled._load() == (None, reason)


def test_the_extension_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_COMM_EXTENSION", "0")
    assert compiled._load() == (None, "FLASH_COMM_EXTENSION=0")


def test_the_extension_describes_itself(native: ModuleType) -> None:
    found = native.info()
    assert found["isa"] in found["isas"] and found["isas"][-1] == "baseline"
    assert bool(found["cuda"]) != bool(found["without_cuda"])
    assert not native.use_isa("abacus") and native.info() == found
    if compiled.available():
        assert compiled.describe().startswith(f"compiled codec ({found['isa']}; ")
        assert compiled.reason() == found["without_cuda"]


def test_the_extension_loads_without_torch(native: ModuleType) -> None:
    """One build serves every torch."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("flashcomm_megatron._C", {native.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.info()["isa"], "torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split()[1] == "False"


# ---- CUDA ------------------------------------------------------------------------------------------------------


def test_cuda_without_a_driver_is_one_readable_error(native: ModuleType) -> None:
    if not native.info()["cuda"]:
        pytest.skip(native.info()["without_cuda"])
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError, match=r"flash-comm: encode on CUDA failed: .*\(cudaError"):
        native.encode_slices_cuda(0, 0, 0, (0, 4, 32), 0, 100, 100, 1, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"flash-comm: decode on CUDA failed: .*\(cudaError"):
        native.reduce_slices_cuda([0], (0, 4, 32), 0, 100, 0, 0, None, 0, 0, 0)


# ---- the build -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FLASHCOMM_CUDA": "2"}, "FLASHCOMM_CUDA=2: choose 0 (without CUDA) or 1 (with it)"),
        ({"FLASHCOMM_CUDA": "1", "PATH": ""}, "FLASHCOMM_CUDA=1 but nvcc is not on PATH"),
        ({"FLASHCOMM_CUDA": "0", "CXX": "no-such-compiler"}, "needs a C++17 compiler: no-such-compiler was not found"),
    ],
)
def test_the_build_refuses_in_one_sentence(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        str(tmp_path),
        "--build-lib",
        str(tmp_path),
    ]
    found = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert found.returncode == 1 and message in found.stderr, found.stderr
    assert "Traceback" not in found.stderr
