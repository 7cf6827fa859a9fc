"""Calibration: a script's row layers observed uncompressed, the file and its refusals, the codecs sites get from it."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
import torch
from ranks import spawn, tensor_parallel
from torch import nn

import flashcomm_megatron as fc
from flashcomm_megatron.codec.published import ranges
from flashcomm_megatron.codec.published.outlier import from_ranges
from flashcomm_megatron.tools import calibrate as calibration

HIDDEN, INNER, TOKENS = 96, 40, 12


# ---- the file ---------------------------------------------------------------------------------------------------


def some_layers() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 2, HIDDEN, generator=generator) for name in ("layers.0.proj", "layers.1.proj")}


def test_a_file_gives_back_what_was_saved_and_safetensors_reads_it_too(tmp_path):
    path = str(tmp_path / "ranges.safetensors")
    ranges.save(path, some_layers(), batches=5)
    file = ranges.load(path)
    assert file.ranks == 2 and file.layers.keys() == some_layers().keys()
    assert all(torch.equal(file.layers[name], values) for name, values in some_layers().items())
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    with safetensors.safe_open(path, "pt") as theirs:
        told = theirs.metadata()
        assert told["format"] == "flashcomm_megatron calibration" and told["version"] == "1"
        assert told["ranks"] == "2" and told["batches"] == "5" and told["package"] == fc.__version__
        assert all(torch.equal(theirs.get_tensor(name), values) for name, values in some_layers().items())


def test_every_file_that_is_not_a_whole_calibration_is_refused_in_one_sentence(tmp_path):
    good = tmp_path / "good"
    ranges.save(str(good), some_layers(), batches=5)
    whole = good.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])

    def with_metadata(**told: str) -> bytes:
        text = json.dumps(header | {"__metadata__": header["__metadata__"] | told}).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    cases = {
        "empty": (b"", "not a safetensors file, or cut short"),
        "text": (b"hello, this is no such file", "not a safetensors file, or cut short"),
        "json": (struct.pack("<Q", 6) + b"[1, 2]", "not a safetensors file, or cut short"),
        "half": (whole[: len(whole) // 2], "cut short: .* of 3072 bytes"),
        "header": (whole[:100], "not a safetensors file, or cut short"),
        "weights": (with_metadata(format="pt"), "a safetensors file but no calibration"),
        "newer": (with_metadata(version="2"), "has version 2, this package reads 1"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            ranges.load(str(tmp_path / name))
        assert "\n" not in str(error.value) and "Calibrate again" in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        ranges.load(str(tmp_path / "nowhere"))


def test_a_file_of_another_model_or_number_of_ranks_is_refused(tmp_path):
    path = str(tmp_path / "ranges")
    ranges.save(path, some_layers(), batches=5)
    file, model = ranges.load(path), {"layers.0.proj": HIDDEN, "layers.1.proj": HIDDEN}
    ranges.check(file, model, 2)
    with pytest.raises(ValueError, match="2 tensor-parallel ranks, this model has 4"):
        ranges.check(file, model, 4)
    with pytest.raises(ValueError, match=r"another model: this one has no row-parallel layer layers\.1\.proj"):
        ranges.check(file, {"layers.0.proj": HIDDEN}, 2)
    with pytest.raises(ValueError, match=r"96 features at layers\.1\.proj, this model has 128"):
        ranges.check(file, model | {"layers.1.proj": 128}, 2)


# ---- the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.py", "--out", "x"], "nowhere.py: no such file"),
        (["--out", "x"], "no script: no such file"),
        ([__file__, "--out", "/nowhere/x"], "there is no folder /nowhere"),
        ([__file__, "--out", "x", "--batches", "0"], "--batches 0: choose 1 or more"),
    ],
)
def test_wrong_command_lines_end_with_one_sentence_and_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        calibration.main(argv)
    assert end.value.code == 2 and message in capsys.readouterr().err


# ---- two ranks of Megatron --------------------------------------------------------------------------------------


class Model(nn.Module):
    """Row-parallel layers one after another, inside a wrapper as Float16Module is one; keeps what they would reduce."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"decoder": nn.ModuleList(row_layer(seed) for seed in range(depth))})
        self.partials: list[torch.Tensor] = []  # of every call of every layer

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for row in self.module["decoder"]:
            self.partials.append(x[..., :INNER] @ row.weight.t())
            x = row(x[..., :INNER])[0]
        return x


def row_layer(seed: int) -> Any:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    config = ModelParallelConfig(tensor_model_parallel_size=2, params_dtype=torch.float32, use_cpu_initialization=True)
    config.gradient_accumulation_fusion = False
    torch.manual_seed(seed)
    shape = {"input_size": 2 * INNER, "output_size": HIDDEN, "bias": False}
    return RowParallelLinear(
        **shape, config=config, init_method=nn.init.normal_, input_is_parallel=True, skip_bias_add=False
    )


live: dict[str, Model] = {}  # the model of this rank, which the script runs
SCRIPT = """
import sys, test_calibration
for step in range(int(sys.argv[1])):
    test_calibration.live["model"](test_calibration.activation(step))
"""


def activation(step: int) -> torch.Tensor:
    """This rank's share of one batch."""
    both = torch.randn(TOKENS, 1, 2 * INNER, generator=torch.Generator().manual_seed(step))
    return both.chunk(2, -1)[torch.distributed.get_rank()]


def calibrate(folder: str, name: str, steps: int, batches: int) -> list[torch.Tensor]:
    """Run the command on this rank; what the model's layers would have reduced."""
    live["model"].partials.clear()
    argv = [f"{folder}/script.py", str(steps), "--out", f"{folder}/{name}", "--batches", str(batches)]
    assert calibration.main(argv) == 0
    return live["model"].partials.copy()


def _two_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    tensor_parallel(world)
    live["model"] = Model(2)
    saw: dict[str, Any] = {"enough": calibrate(folder, "enough", steps=9, batches=4)}
    saw["short"] = calibrate(folder, "short", steps=3, batches=8)
    saw["uncompressed"] = fc.stats()["calls"] == 0  # neither quantized nor deferred
    saw["refused"] = refusals(folder)

    live["model"].partials.clear()
    fc.reset_stats()
    with fc.flashcomm(fc.Config(bits=4, recipe="outlier", calibration=f"{folder}/enough", min_bytes=0)):
        saw["output"] = live["model"](activation(100))
    return saw | {"partials": live["model"].partials, "stats": fc.stats()}


def refusals(folder: str) -> dict[str, str]:
    """What is said when the file does not fit the model, and when the model gives no ranges."""
    told = {}
    for name, depth in (("deeper", 3), ("shallower", 1)):
        with fc.flashcomm(fc.Config(bits=4, recipe="outlier", calibration=f"{folder}/enough", min_bytes=0)):
            with pytest.raises(ValueError) as error:
                Model(depth)(activation(0))
            told[name] = str(error.value)
    broken = Model(1)
    broken.module["decoder"][0].weight.data.fill_(math.nan)
    fitting, live["model"] = live["model"], broken
    with pytest.raises(SystemExit) as end:
        calibrate(folder, "nan", steps=9, batches=2)
    live["model"] = fitting
    return told | {"nan": str(end.value)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Folder of the files and what each rank saw."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "script.py").write_text(SCRIPT)
    return folder, spawn(_two_ranks, 2, str(folder))


@pytest.mark.parametrize(("name", "batches"), [("enough", 4), ("short", 3)])
def test_a_script_is_calibrated_on_the_moving_average_of_its_batches(ranks, name, batches):
    folder, saw = ranks
    file = ranges.load(str(folder / name))
    assert list(file.layers) == ["decoder.0", "decoder.1"], "names without the wrapper"
    for layer, found in enumerate(file.layers.values()):
        for rank in range(2):
            partials = saw[rank][name][layer::2][:batches]
            assert len(partials) == batches
            low, high = partials[0].view(TOKENS, HIDDEN).aminmax(dim=0)
            for partial in partials[1:]:
                least, most = partial.view(TOKENS, HIDDEN).aminmax(dim=0)
                low, high = 0.99 * low + 0.01 * least, 0.99 * high + 0.01 * most
            torch.testing.assert_close(found[:, rank], torch.stack([low, high]))


def test_the_script_ends_once_enough_was_seen(ranks):
    for rank in ranks[1]:
        assert len(rank["enough"]) == 2 * 4 + 1 and len(rank["short"]) == 2 * 3


def test_calibration_compresses_nothing(ranks):
    assert all(rank["uncompressed"] for rank in ranks[1])


def test_sites_use_their_own_scales_on_every_rank(ranks):
    folder, saw = ranks
    assert torch.equal(saw[0]["output"], saw[1]["output"])
    low, high = ranges.load(str(folder / "enough")).layers["decoder.1"]
    parts = [rank["partials"][1].flatten() for rank in saw]
    payloads = [from_ranges(low, high, rank).encode(part) for rank, part in enumerate(parts)]
    expected = from_ranges(low, high, 0).decode_sum(payloads, torch.empty(parts[0].numel()))
    assert torch.equal(saw[0]["output"].flatten(), expected)
    assert saw[0]["stats"]["quantized"] == 2 and not saw[0]["stats"]["deferred"]


def test_a_file_of_another_model_is_refused_at_its_first_forward(ranks):
    for rank in ranks[1]:
        assert "another model: it has no layer decoder.2. Calibrate again" in rank["refused"]["deeper"]
        assert "another model: this one has no row-parallel layer decoder.1" in rank["refused"]["shallower"]


def test_a_model_that_gives_nan_is_not_calibrated(ranks):
    folder, saw = ranks
    assert all("layer decoder.0 met a NaN or an Inf" in rank["refused"]["nan"] for rank in saw)
    assert not (folder / "nan").exists()
