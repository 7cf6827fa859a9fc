"""Thresholds: defaults by place, files of measured ones and what is refused, and the measuring itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from specification import planned

from flashcomm_megatron import collectives
from flashcomm_megatron.codec import native
from flashcomm_megatron.collectives import minimum_size, plan
from flashcomm_megatron.collectives.minimum_size import Case
from flashcomm_megatron.comm.communicator import Communicator
from flashcomm_megatron.comm.simulated import Simulated
from flashcomm_megatron.config import Config
from flashcomm_megatron.observe import messages
from flashcomm_megatron.tools import tune as tuning
from flashcomm_megatron.tools.tune import Timing

CASE = Case("all_reduce", "bfloat16", 4, "auto")


def place(world: int, machines: int = 1) -> str:
    return minimum_size.topology_of(world, range(machines), "cpu")


def reason(kind: str, numel: int, over: str | None = None, **options: object) -> str | None:
    x = torch.empty(1, dtype=torch.bfloat16).expand(numel)
    return planned(kind, x, 2, Config(bits=4, **options), over=over).deferred


def test_through_shared_memory_compression_starts_earlier_than_over_the_process_group() -> None:
    for over in (None, "shared memory"):
        assert reason("all_reduce", 512, over) is None
        assert reason("all_reduce", 511, over) == "below 1024 bytes"
        assert reason("all_gather", 8191, over) == "below 32768 bytes"
    assert reason("all_reduce", 1024, transport="group") == reason("all_reduce", 1024, "cpu") == "below 262144 bytes"
    assert reason("all_reduce", 131072, "cpu") is None
    assert reason("all_reduce", 131072, "cuda") == "below 1048576 bytes"


def test_a_measured_file_decides_for_its_cases_and_its_number_of_ranks(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    minimum_size.write(path, place(2), {CASE: 4096})
    minimum_size.write(path, place(4), {CASE: minimum_size.NEVER})
    config, default = Config(bits=4, thresholds=str(path)), minimum_size.DEFAULTS["cpu"]

    def minimum(where: str, case: Case = CASE, config: Config = config) -> int:
        return minimum_size.minimum_size(case, where, "cpu", config)

    assert minimum(place(2)) == 4096
    assert minimum(place(4)) == minimum_size.NEVER, "one number of ranks does not erase another"
    assert minimum(place(8)) == minimum(place(2), CASE._replace(bits=8)) == minimum(place(2, machines=2)) == default
    asked = Config(bits=4, thresholds=str(path), min_bytes=7)
    assert minimum(place(2), config=asked) == 7, "what the user says comes first"


def test_the_width_that_is_used_decides(tmp_path: Path) -> None:
    """Gradients have one of their own, and so has a model's last sum, also where gradients have the same."""
    path = tmp_path / "tuned.json"
    minimum_size.write(path, place(2), {CASE._replace(bits=bits): bits << 10 for bits in (4, 6, 8)})
    x = torch.empty(1, dtype=torch.bfloat16)
    for grad_bits in (8, 6):
        config = Config(bits=4, grad_bits=grad_bits, thresholds=str(path))
        found = {bits: planned("all_reduce", x, 2, config, over="cpu", legs=config.legs_of(bits)) for bits in (4, 6, 8)}
        assert {bits: each.minimum for bits, each in found.items()} == {bits: bits << 10 for bits in found}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "No such file"),
        ("no json", "no file of thresholds"),
        ("[]", "no file of thresholds"),
        ('{"circumstances": [], "least bytes by place": {}}', "no file of thresholds"),
        (
            '{"circumstances": {}, "least bytes by place": {"2 ranks, 1 machines, cpu": [["all_reduce", 1]]}}',
            "no file of thresholds",
        ),
        ('{"circumstances": {"torch": "1.0"}, "least bytes by place": {}}', "torch 1.0, here"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "tuned.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        minimum_size.read(str(path))
    assert "bench --tune" in str(error.value) and str(path) in str(error.value)


def test_the_threshold_is_where_all_larger_sizes_pay() -> None:
    faster, slower, noisy = (1.0, 0.5, 0.1), (1.0, 1.2, 0.1), (1.0, 0.97, 0.2)
    assert tuning.threshold([Timing(1, *slower), Timing(2, *faster), Timing(4, *faster)]) == 2
    assert tuning.threshold([Timing(1, *faster), Timing(2, *noisy), Timing(4, *faster)]) == 4
    assert tuning.threshold([Timing(1, *faster), Timing(2, *slower)]) == minimum_size.NEVER


def test_bench_measures_on_real_ranks_and_its_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    script = f"import sys, flashcomm_megatron.tools.tune as t; t.SIZES, t.SECONDS = (1 << 10, 1 << 16), 0.01; " \
             f"sys.exit(t.main(['--tune', {str(path)!r}, '--bits', '4']))"  # fmt: skip
    ran = forks.python("-c", script, world=2)
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()].count("all_reduce") == 1  # one rank speaks
    rows = json.loads(path.read_text())["least bytes by place"]["2 ranks, 1 machines, shared memory"]
    assert [row[0] for row in rows] == list(tuning.KINDS)
    assert all(row[4] in (1 << 10, 1 << 16, minimum_size.NEVER) for row in rows)
    assert minimum_size.read(str(path))["2 ranks, 1 machines, shared memory"].keys() == {
        CASE._replace(collective=kind) for kind in tuning.KINDS
    }


def test_bench_alone_says_what_it_needs() -> None:
    done = forks.python("-m", "flashcomm_megatron", "bench")
    assert done.returncode == 2 and "torchrun" in done.stderr


# ---- a GPU machine without a compiler -----------------------------------------------------------------------------


def planned_on_gpus(has_kernels: bool, **options: Any) -> plan.Plan:
    comm = Simulated(0, 8, kind="cuda")
    comm.gpus = comm.gpus._replace(has_kernels=has_kernels)
    return plan.plan("all_reduce", (4096, 4096), torch.bfloat16, torch.device("meta"), comm, Config(bits=4, **options))


def test_without_cuda_kernels_everything_stays_exact_and_strict_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's codec takes longer there than it saves."""
    monkeypatch.setattr(messages, "_failed", None)
    monkeypatch.setattr(messages, "_raised", None)
    made = planned_on_gpus(has_kernels=False)
    assert made.deferred is not None and "CUDA wheel" in made.deferred and planned_on_gpus(True).deferred is None
    assert planned_on_gpus(has_kernels=False, min_bytes=0).deferred is None, "asked for"
    with pytest.raises(RuntimeError, match="no CUDA kernels in the extension of some rank: install"):
        collectives.count_deferred(planned_on_gpus(has_kernels=False, strict=True))


def test_a_recipe_without_cuda_kernels_stays_exact() -> None:
    made = planned_on_gpus(True, recipe="mx")
    assert made.deferred is not None and made.deferred.startswith("no CUDA kernels for recipe mx")
    assert planned_on_gpus(True, recipe="mx", min_bytes=0).deferred is None


def lacking(kind: str, shape: tuple[int, ...], nodes: tuple[int, ...] = (), **options: Any) -> str:
    """Why a call on 8 GPUs stays exact, as far as CUDA kernels are concerned."""
    comm = Simulated(0, 8, nodes, kind="cuda")
    made = plan.plan(kind, shape, torch.bfloat16, torch.device("meta"), comm, Config(bits=4, **options))
    return (made.deferred or "").removesuffix(": --flash-comm-min-bytes 0 compresses without, slower")


@pytest.mark.parametrize("width", [576, 2560, 2880, 3584, 4608, 5120, 7168, 8192])
def test_hidden_sizes_of_models_have_cuda_kernels(width: int) -> None:
    assert not lacking("all_reduce", (8192, width)) and not lacking("all_to_all", (width,))


def test_what_has_no_cuda_kernel_stays_exact_and_is_named() -> None:
    none = "no CUDA kernels for "
    assert lacking("all_reduce", (8192, 1000)) == none + "rows of 1000 values"
    assert lacking("all_to_all", (5000,)) == none + "rows of 5000 values", "a message has any number of rows"
    assert not lacking("all_to_all", ()) and not lacking("all_reduce", (1 << 23,)), "one row"
    assert lacking("all_reduce", (8192, 4096), block=256) == none + "blocks of 512 bfloat16 values"
    over_machines = {"nodes": (0, 0, 0, 0, 1, 1, 1, 1), "block": 128}
    assert lacking("all_reduce", (8192, 8192), **over_machines) == none + "blocks of 256 float32 values", "summed in it"
    assert not lacking("all_reduce", (1 << 18, 8192)), "whole super-blocks, however many"
    assert lacking("all_reduce", (1 << 18, 5120)) == none + "rows of 5120 values, more than 2**30 in all"


def kernels_of(rank: int, world: int, having: list[int]) -> bool:
    native.cuda = lambda: object() if rank in having else None
    return Communicator.of(dist.group.WORLD).gpus.has_kernels


@pytest.mark.parametrize(("having", "expected"), [([0, 1], True), ([1], False)])
def test_kernels_serve_where_every_rank_has_them(having: list[int], expected: bool) -> None:
    assert spawn(kernels_of, 2, having) == [expected] * 2
