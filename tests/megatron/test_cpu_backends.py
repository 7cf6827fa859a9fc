"""CPU mode beneath and around a script: backends, compilers, data loading, options of the command line, Triton."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing.spawn
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashcomm_megatron import cpu
from flashcomm_megatron.cpu import backends, triton


@pytest.fixture
def on() -> Iterator[None]:
    cpu.enable(force=True, scripts=True)
    yield
    cpu.disable()


def test_nccl_is_gloo_and_has_a_mean(on: None) -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=None)
    try:
        group = dist.new_group([0], backend="nccl", pg_options=object())
        assert dist.get_backend() == dist.get_backend(group) == "gloo"
        x = torch.full((2,), 3.0)
        dist.all_reduce(x, op=dist.ReduceOp.AVG, group=group)
        assert x.tolist() == [3.0, 3.0]
        dist.all_reduce(x, group=group)
        assert x.tolist() == [3.0, 3.0]
    finally:
        dist.destroy_process_group()


def test_the_mean_of_two_is_half_their_sum(on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    [mean] = [seam.replace for seam in backends.SEAMS if seam.path == "torch.distributed.all_reduce"]
    sums = mean(lambda tensor, *rest: (tensor.mul_(2), rest))
    x = torch.full((2,), 3.0)
    assert sums(x, dist.ReduceOp.AVG)[1] == (dist.ReduceOp.SUM, None, False)
    assert x.tolist() == [3.0, 3.0]


def test_torch_compile_and_script_return_the_function_itself(on: None) -> None:
    def function(x: int) -> int:
        return x

    assert torch.compile(function) is function
    assert torch.compile(mode="max-autotune")(function) is function
    assert torch.jit.script(function) is function


def test_a_spawned_child_does_not_import_the_script(on: None) -> None:
    assert not [key for key in multiprocessing.spawn.get_preparation_data("child") if key.startswith("init_main")]


def test_reading_data_does_not_move_the_models_stream(on: None) -> None:
    before = torch.get_rng_state()
    iter(torch.utils.data.DataLoader([1, 2]))
    assert torch.equal(torch.get_rng_state(), before)


def test_data_loaders_pin_no_memory(on: None) -> None:
    """A torch built for CUDA would ask for a device that is not there."""
    assert not torch.accelerator.is_available()
    assert [each.tolist() for each in torch.utils.data.DataLoader([1, 2], pin_memory=True, num_workers=1)] == [[1], [2]]


def test_names_that_only_transformer_engine_defines() -> None:
    (module, name, _), *_ = backends.UNDEFINED
    owner = importlib.import_module(module)
    before = hasattr(owner, name)
    cpu.enable(force=True, scripts=True)
    assert hasattr(owner, name)
    cpu.disable()
    assert hasattr(owner, name) == before


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="train.py")
    made.add_argument("--transformer-impl", default="transformer_engine")
    made.add_argument("--cuda-graph-impl", default="none")
    made.add_argument("--fp8-format", dest="fp8")
    return made


def test_options_get_defaults_that_need_no_gpu(on: None) -> None:
    assert parser().parse_args([]).transformer_impl == "local"
    assert not hasattr(argparse.ArgumentParser().parse_args([]), "transformer_impl")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--transformer-impl", "transformer_engine"], "Transformer Engine's layers need a GPU: leave"),
        (["--fp8-format", "hybrid"], "FP8 needs a GPU: leave --fp8-format out."),
        (["--cuda-graph-impl", "local"], "CUDA graphs need a GPU: leave --cuda-graph-impl out."),
    ],
)
def test_options_that_need_a_gpu_are_refused_in_one_sentence(
    on: None, capsys: pytest.CaptureFixture[str], given: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        parser().parse_args(given)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith(f"train.py: error: {sentence}") and said.count("\n") == 1


def test_triton_is_lent_for_one_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("triton"):
        pytest.skip("Triton is installed here")
    source = "import triton\nimport triton.language as tl\n@triton.jit\ndef kernel(n: tl.constexpr): ...\n"
    for name in ("borrower", "other"):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(triton, "USERS", ("borrower",))
    triton.enter()
    try:
        importlib.import_module("borrower")
        with pytest.raises(ImportError):
            importlib.import_module("other")
    finally:
        triton.leave()
        sys.modules.pop("borrower", None)
    assert "triton" not in sys.modules and importlib.util.find_spec("triton") is None
