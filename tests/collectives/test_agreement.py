"""What only one rank gets wrong is told to all of them: files that it cannot use, options however long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import spawn

from flashcomm_megatron import collectives
from flashcomm_megatron.codec.published import ranges
from flashcomm_megatron.collectives import agreement, minimum_size
from flashcomm_megatron.config import Config
from flashcomm_megatron.megatron import context as where
from flashcomm_megatron.megatron import differentiable


def refusal(rank: int, world: int, options: list[dict[str, object]]) -> str:
    """What the first call is refused with, on a group where every rank has options of its own."""
    with pytest.raises(RuntimeError) as error:
        collectives.all_reduce(torch.ones(5000), None, Config(bits=4, timeout=20, **options[rank]))
    return str(error.value)


def test_thresholds_that_one_rank_cannot_use_are_refused_by_all(tmp_path: Path) -> None:
    good, elsewhere = tmp_path / "good.json", tmp_path / "elsewhere.json"
    minimum_size.write(good, "here", {})
    made = json.loads(good.read_text())
    made["circumstances"]["torch"] = "1.0"
    elsewhere.write_text(json.dumps(made))
    for bad, told in ((elsewhere, "measured elsewhere (torch 1.0"), (tmp_path / "gone.json", "No such file")):
        messages = spawn(refusal, 2, [{"thresholds": str(good)}, {"thresholds": str(bad)}])
        assert messages[0] == messages[1] and told in messages[0] and "sha256=" in messages[0]


def uncalibrated(rank: int, world: int, path: str) -> str:
    """One rank sees another file under the same name, as where it lies on a disk of each machine."""
    if rank == 1:
        ranges.digest.__wrapped__.__globals__["Path"] = lambda path: Path(path + ".gone")
    config = Config(bits=4, recipe="outlier", calibration=path, timeout=20)
    site = where.Site("row", torch.nn.Linear(1, 1), config)
    with where.at(site), pytest.raises(RuntimeError) as error:
        differentiable.planned("row", "all_reduce", torch.ones(5000), dist.group.WORLD)
    return str(error.value)


def test_a_calibration_that_one_rank_cannot_read_is_refused_by_all(tmp_path: Path) -> None:
    path = str(tmp_path / "ranges.safetensors")
    ranges.save(path, {"layer": torch.zeros(2, 2, 8)}, batches=1)
    first, second = spawn(uncalibrated, 2, path)
    assert first == second and "(calibration: sha256=" in first and "(calibration: No such file" in first


def test_options_differ_however_long_they_are() -> None:
    long = "x" * 3000
    first, second = spawn(refusal, 2, [{"metrics": long + "a"}, {"metrics": long + "b"}])
    assert first == second and "different configurations" in first
    configs = [Config(bits=4, metrics=long + end) for end in "ab"]
    shown = [agreement._describe(config)[: agreement.TEXT_BYTES] for config in configs]
    assert shown[0] != shown[1]
