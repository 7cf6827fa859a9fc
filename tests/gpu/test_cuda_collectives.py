"""The fused collectives on one GPU: several ranks in one launch, or each with its own kernels on its own stream."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from patience import patient
from specification import Uncompressed, carried, expected, outputs, plan_of, same, strange

from flashcomm_megatron.codec import Uniform
from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.collectives import algorithms
from flashcomm_megatron.collectives.algorithms import Residuals
from flashcomm_megatron.config import Config

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(extension.cuda() is None, reason=f"no CUDA kernels: {extension.reason()}"),
]

if torch.cuda.is_available() and extension.cuda() is not None:
    from cuda_ranks import SLOWER, OneLaunch, Streams

KINDS = ["one-step", "two-step", "reduce_scatter", "all_gather"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK32 = (Uniform(4, 32), Uniform(4, 32))
AUTO, FLASH_V2 = Config(bits=4).legs, Config(bits=3, recipe="flash-v2").legs


@pytest.fixture
def ranks(request):
    """A world made by the test's parameter, closed when the test ends."""
    made = request.param()
    yield made
    torch.cuda.synchronize()
    made.close()


def one_launch(*args, **kwargs):
    return pytest.param(
        lambda: OneLaunch(*args, **kwargs), id=f"{args[0]}-ranks{'-host' if kwargs.get('host_memory') else ''}"
    )


def check(ranks, kind, numel, dtype, codecs, seed=0, in_place=False):
    """One call on strange data, outputs full of NaN before, against the specification."""
    if kind == "reduce_scatter":
        numel = math.ceil(numel / ranks.world) * ranks.world
    parts = [strange(numel, dtype, seed * 10 + rank) for rank in range(ranks.world)]
    x = [part.cuda() for part in parts]
    out = x if in_place else outputs(kind, x)
    ranks.run(kind, codecs, x, out)
    for rank, want in enumerate(expected(kind, codecs, parts)):
        assert same(out[rank], want), (kind, numel, dtype, rank)
        assert kind == "reduce_scatter" or same(out[rank], out[0].cpu()), "ranks agree"
    assert ranks.kernels.error() == []


# ---- what is computed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [one_launch(world) for world in range(2, 9)], indirect=True)
def test_any_world_kind_and_numel_equals_the_specification(ranks):
    for kind, (seed, numel) in product(KINDS, enumerate((1, 7, 65, 2048, 10_001, 300_007))):
        for codecs in (BLOCK32, AUTO, FLASH_V2):
            check(ranks, kind, numel, torch.bfloat16, codecs, seed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ranks", [one_launch(3)], indirect=True)
def test_any_width_dtype_and_block_equals_the_specification(ranks, bits):
    for dtype, block, kind in product(DTYPES, (8, 32, 40, 128, 1024), KINDS):
        check(ranks, kind, 20_001, dtype, (Uniform(bits, block), Uniform(bits, block)))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("ranks", [one_launch(3)], indirect=True)
def test_every_width_of_the_recipes_equals_the_specification(ranks, bits):
    for dtype, recipe, kind in product(DTYPES, ("auto", "flash-v2"), KINDS):
        for block in (32, 64):
            check(ranks, kind, 20_001, dtype, Config(bits=bits, recipe=recipe, block=block).legs)


@pytest.mark.parametrize("ranks", [one_launch(4)], indirect=True)
def test_legs_of_different_widths_equal_the_specification(ranks):
    for dtype in DTYPES:
        check(ranks, "two-step", 100_003, dtype, Config(bits=6, recipe="flash-v1").legs)


@pytest.mark.parametrize("ranks", [one_launch(2, 4), one_launch(5, 4)], indirect=True)
def test_messages_of_many_rounds_equal_the_specification(ranks):
    """Four blocks a rank and the smallest inboxes: 3 million values take dozens of rounds of one kernel."""
    for kind, codecs in product(KINDS, ((Uniform(8, 8), Uniform(8, 8)), AUTO)):
        check(ranks, kind, 3_000_001 if kind != "all_gather" else 500_001, torch.bfloat16, codecs)


@pytest.mark.parametrize("ranks", [one_launch(2), one_launch(8)], indirect=True)
def test_a_call_may_reduce_in_place(ranks):
    for kind, dtype, codecs in product(("one-step", "two-step"), DTYPES, (BLOCK32, AUTO)):
        check(ranks, kind, 1_000_003, dtype, codecs, in_place=True)


@pytest.mark.parametrize("ranks", [one_launch(2, host_memory=True), one_launch(4, host_memory=True)], indirect=True)
def test_inboxes_in_host_memory_give_the_same_bits(ranks):
    for kind in KINDS:
        check(ranks, kind, 700_001, torch.bfloat16, BLOCK32)


@pytest.mark.parametrize("ranks", [one_launch(2), one_launch(8)], indirect=True)
def test_the_uncompressed_kernel_sums_exactly(ranks):
    for kind, dtype in product(("one-step", "two-step"), (torch.float16, torch.bfloat16)):
        parts = [torch.randint(-8, 8, (200_003,), device="cuda").to(dtype) for _ in range(ranks.world)]
        out = outputs(kind, parts)
        ranks.run(kind, (Uncompressed(), Uncompressed()), parts, out)
        assert all(torch.equal(each, sum(parts)) for each in out)


@pytest.mark.parametrize("kind", ["one-step", "two-step", "reduce_scatter"])
@pytest.mark.parametrize("ranks", [one_launch(2), one_launch(3)], indirect=True)
def test_residuals_are_added_to_the_next_call(ranks, kind):
    """Three calls with a memory: results and memories of the algorithms over any process group."""
    for dtype in DTYPES:
        calls = [[strange(30_000, dtype, 10 * call + r) for r in range(ranks.world)] for call in range(3)]
        plans = [plan_of(kind, AUTO, dtype, 30_000, ranks.world, r) for r in range(ranks.world)]
        lost = [
            algorithms.fused_residuals(x.cuda(), plan, Residuals()) for x, plan in zip(calls[0], plans, strict=True)
        ]
        by_leg = [each[leg] for leg in (0, 1) for each in lost]
        for parts, (wanted, losses) in zip(calls, carried(kind, AUTO, calls, ranks.world), strict=True):
            x = [part.cuda() for part in parts]
            out = outputs(kind, x)
            ranks.run(kind, AUTO, x, out, by_leg)
            assert all(same(each, want) for each, want in zip(out, wanted, strict=True)), (kind, dtype)
            kept = [want for leg in losses for want in leg]
            assert all(want is None or same(each, want) for each, want in zip(by_leg, kept, strict=True)), (kind, dtype)


# ---- many calls -----------------------------------------------------------------------------------------------


def integers(numel: int, rank: int, call: int) -> torch.Tensor:
    """0 to 15, both ends in every block of 32: 4-bit blocks hold them, and 8-bit blocks their sums over 2, exactly."""
    x = (torch.arange(numel, device="cuda") * (2 * rank + 3) + call * 5) % 16
    x[::32], x[1::32] = 0, 15
    return x.bfloat16()


@pytest.mark.parametrize("ranks", [one_launch(2)], indirect=True)
def test_fifty_thousand_calls_of_alternating_shapes_stay_exact(ranks):
    """A new payload every call, exact to the last bit; kernels that miss a flag end at their deadline."""
    sizes = [64, 200_000, 2048, 32, 70_000, 8192 * 32]
    exact = {n: [[integers(n, rank, call) for rank in range(2)] for call in range(4)] for n in sizes}
    out = {n: [torch.empty(n, dtype=torch.bfloat16, device="cuda") for _ in range(2)] for n in sizes}
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for call in range(50_000 // SLOWER):
        n = sizes[call % len(sizes)]
        x = exact[n][call // len(sizes) % 4]
        ranks.run("one-step", BLOCK32, x, out[n])
        if call % 50 < len(sizes):  # every size, in turn with every payload
            wrong += (out[n][0] != x[0] + x[1]).sum() + (out[n][1] != x[0] + x[1]).sum()
            out[n][0].fill_(torch.nan), out[n][1].fill_(torch.nan)
    assert wrong.item() == 0 and ranks.kernels.error() == []


@pytest.mark.parametrize("ranks", [one_launch(2), one_launch(4)], indirect=True)
def test_calls_stay_right_when_the_call_counter_wraps(ranks):
    ranks.kernels.preset(2**64 - 4)
    for call, kind in enumerate(KINDS * 3):
        check(ranks, kind, (100, 50_000)[call % 2], torch.bfloat16, BLOCK32, call)


def run_on_streams(ranks, kinds, **tests) -> bool:
    """Launch all calls of all ranks without waiting between them; whether every result was right."""
    runs = []
    for call, kind in enumerate(kinds):
        parts = [
            torch.randn(40_000, generator=torch.Generator().manual_seed(call * 9 + r)).bfloat16() for r in range(2)
        ]
        x = [part.cuda() for part in parts]
        runs.append((kind, parts, x, outputs(kind, x)))
    torch.cuda.synchronize()
    for kind, _, x, out in runs:
        ranks.run_all(kind, BLOCK32, x, out, **tests)
    torch.cuda.synchronize()
    assert all(kernels.error() == [] for kernels in ranks.kernels)
    return all(
        same(found, want)
        for kind, parts, _, out in runs
        for found, want in zip(out, expected(kind, BLOCK32, parts), strict=True)
    )


@pytest.mark.parametrize("ranks", [pytest.param(lambda: Streams(2), id="streams")], indirect=True)
def test_kernels_that_overtake_each_other_stay_right(ranks):
    """Reduce-scatter after reduce-scatter, gathers after gathers, and mixed, with a rank that reads 200 us late."""
    sequences = [["reduce_scatter"] * 6, ["all_gather"] * 6, ["reduce_scatter", "all_gather"] * 4, KINDS * 3]
    for kinds, stalled in product(sequences, (0, 1)):
        assert run_on_streams(ranks, kinds, stalled_rank=stalled, stall=200e-6 * SLOWER), (kinds, stalled)


@pytest.mark.parametrize("ranks", [pytest.param(lambda: Streams(2), id="streams")], indirect=True)
def test_negative_control_with_one_region(ranks):
    """The test above must be able to fail: without the ring, the stalled reader finds the next call's data."""
    right = [
        run_on_streams(ranks, [kind] * 8, stalled_rank=1, stall=1e-3 * SLOWER, single_buffer=True)
        for kind in ("reduce_scatter", "all_gather")
    ]
    assert not all(right)


@pytest.mark.parametrize("ranks", [pytest.param(lambda: Streams(2), id="streams")], indirect=True)
def test_a_missing_rank_is_named_at_the_deadline(ranks):
    x = torch.randn(10_000, device="cuda").bfloat16()
    out = torch.zeros_like(x)
    ranks.run(0, "one-step", BLOCK32, x, out, deadline=0.05)
    torch.cuda.synchronize()
    assert out.isnan().all(), "no partial sum passes for a result"
    leg, missing, _, call = ranks.kernels[0].error()
    assert (leg, missing, call) == (0, 1, 1)
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record(ranks.streams[0])
    later = {kind: outputs(kind, [x, x])[0].zero_() for kind in KINDS}
    for kind, out in later.items():
        ranks.run(0, kind, BLOCK32, x, out, deadline=20.0)
    ended.record(ranks.streams[0])
    torch.cuda.synchronize()
    assert started.elapsed_time(ended) < 5_000, "calls behind an error do not wait again"
    assert all(out.isnan().all() for out in later.values()), "and their outputs are NaN as well"


# ---- graphs ---------------------------------------------------------------------------------------------------


def capture(ranks, kind, numel, calls):
    """A graph of ``calls`` collectives, each on its own tensors."""
    runs = [([integers(numel, r, call) for r in range(ranks.world)],) for call in range(calls)]
    runs = [(x, outputs(kind, x)) for (x,) in runs]
    ranks.run(kind, BLOCK32, *runs[0])  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x, out in runs:
            ranks.run(kind, BLOCK32, x, out)
    return graph, runs


@pytest.mark.parametrize("ranks", [one_launch(2)], indirect=True)
def test_graphs_of_different_sizes_can_be_replayed_in_turns(ranks):
    """Inputs change in place and outputs are full of NaN before every replay; eager calls come between."""
    graphs = [capture(ranks, "one-step", numel, calls) for numel, calls in ((64, 5), (300_000, 3), (4096, 6))]
    for replay in range(max(3, 20 // SLOWER)):
        for graph, runs in graphs:
            for call, (x, out) in enumerate(runs):
                for rank in range(2):
                    x[rank].copy_(integers(x[rank].numel(), rank, replay + call))
                    out[rank].fill_(torch.nan)
            graph.replay()
            assert all(torch.equal(each, x[0] + x[1]) for x, out in runs for each in out), replay
        check(ranks, "two-step", 5000 + replay, torch.bfloat16, BLOCK32, replay)


# ---- memory checker -------------------------------------------------------------------------------------------

SHORT_RUN = """
import sys; sys.path[:0] = {folders!r}
from test_cuda_collectives import *
made = OneLaunch(2, 4)
for kind in KINDS:
    check(made, kind, 9001, torch.bfloat16, BLOCK32)
    check(made, kind, 130_001, torch.float32, (Uniform(8, 24), Uniform(8, 24)))
made.close()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_memory_checker_finds_nothing(tool):
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer is not installed")
    root = Path(__file__).resolve().parents[2]
    folders = [str(root / each) for each in ("tests/gpu", "tests/support", "tests/collectives", ".")]
    script = SHORT_RUN.format(folders=folders)
    command = [checker, "--tool", tool, "--error-exitcode", "7", sys.executable, "-c", script]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=patient(150))
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer {tool} did not end within 150 s")
    if "not supported" in found.stdout + found.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
