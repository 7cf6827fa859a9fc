"""The fused collectives, run on the host in any order of ranks: bit for bit their specification."""

from __future__ import annotations

import math
from itertools import product

import emulator
import pytest
import torch
from codec_cases import KINDS, tensor
from protocol_model import AS_BUILT, reached
from specification import Uncompressed, carried, expected, outputs, plan_of, same, strange

from flashcomm_megatron.codec import Spike, Uniform
from flashcomm_megatron.collectives import algorithms
from flashcomm_megatron.collectives.algorithms import Residuals
from flashcomm_megatron.config import Config

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.slow  # a minute of compiling


# ---- collectives ----------------------------------------------------------------------------------------------


def check(kind, world, numel, dtype, codecs, seed=0, in_place=False, setting=None):
    if kind == "reduce_scatter":
        numel = math.ceil(numel / world) * world
    parts = [strange(numel, dtype, seed * 10 + rank).clone() for rank in range(world)]
    want = expected(kind, codecs, parts)
    ranks = setting or emulator.World(world)
    out = parts if in_place else outputs(kind, parts)
    ranks.run([ranks.job(kind, codecs, parts, out)], seed)
    for rank in range(world):
        assert same(out[rank], want[rank]), (kind, world, numel, dtype, codecs, rank)


BLOCK32 = (Uniform(4, 32), Uniform(4, 32))
AUTO, FLASH_V2 = Config(bits=4).legs, Config(bits=3, recipe="flash-v2").legs


@pytest.mark.parametrize("kind", emulator.KINDS)
def test_any_numel_equals_the_specification(kind):
    for numel, codecs in product((1, 7, 65, 2048, 2049, 6000), (BLOCK32, AUTO, FLASH_V2)):
        check(kind, 3, numel, torch.bfloat16, codecs)


@pytest.mark.parametrize("world", range(2, 9))
def test_any_world_equals_the_specification(world):
    for kind, codecs in product(emulator.KINDS, ((Uniform(8, 64), Uniform(8, 64)), AUTO, FLASH_V2)):
        check(kind, world, 3000, torch.float16, codecs)


@pytest.mark.parametrize("bits", [4, 8])
def test_any_width_dtype_and_block_equals_the_specification(bits):
    for dtype, block in product(DTYPES, (8, 32, 40, 128)):
        check("two-step", 2, 2500, dtype, (Uniform(bits, block), Uniform(bits, block)))


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_width_and_dtype_of_the_recipes_equals_the_specification(bits):
    for dtype, recipe in product(DTYPES, ("auto", "flash-v2")):
        check("two-step", 2, 5000, dtype, Config(bits=bits, recipe=recipe).legs)
    for block, dtype in product((8, 40, 256), DTYPES):
        check("two-step", 2, 2500, dtype, (Spike(bits, block), Spike(bits, block)))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_extremes_equal_the_specification(kind):
    """Among it blocks so large that their coefficients must be shrunk before they are added."""
    for algorithm, dtype in product(("one-step", "two-step"), DTYPES):
        parts = [tensor(kind, 2500, dtype, rank) for rank in range(3)]
        for codecs in (AUTO, FLASH_V2):
            ranks, out = emulator.World(3), outputs(algorithm, parts)
            ranks.run([ranks.job(algorithm, codecs, parts, out)])
            wanted = expected(algorithm, codecs, parts)
            assert all(same(found, want) for found, want in zip(out, wanted, strict=True)), (algorithm, dtype, codecs)


def test_legs_of_different_widths_equal_the_specification():
    check("two-step", 3, 5000, torch.bfloat16, Config(bits=6, recipe="flash-v1").legs)


@pytest.mark.parametrize("kind", emulator.KINDS)
def test_messages_of_many_rounds_equal_the_specification(kind):
    """An inbox that holds one tile for each block: 40,000 values take several rounds."""
    ranks = emulator.World(2, blocks=2, region=2 * 16384)
    numel = 150_000 if kind == "two-step" else 80_000
    x = [torch.zeros(numel, dtype=torch.bfloat16)] * 2
    for codecs in ((Uniform(8, 8), Uniform(8, 8)), Config(bits=8).legs):
        assert ranks.shape(ranks.job(kind, codecs, x, outputs(kind, x))).rounds > 1
        check(kind, 2, numel, torch.bfloat16, codecs, setting=ranks)


def test_a_call_may_reduce_in_place():
    for kind, codecs in product(("one-step", "two-step"), (BLOCK32, AUTO)):
        check(kind, 2, 40_000, torch.float32, codecs, in_place=True)


def test_the_uncompressed_kernel_sums_exactly():
    parts = [torch.randint(-8, 8, (50_001,)).to(torch.float16) for _ in range(3)]
    for kind in ("one-step", "two-step"):
        ranks, out = emulator.World(3), outputs("one-step", parts)
        ranks.run([ranks.job(kind, (Uncompressed(), Uncompressed()), parts, out)])
        assert all(same(each, sum(parts)) for each in out)


# ---- feedback ------------------------------------------------------------------------------------------------


def check_carried(kind, world, numel, dtype, legs, make):
    calls = [[make(numel, dtype, 10 * call + rank) for rank in range(world)] for call in range(3)]
    plans = [plan_of(kind, legs, dtype, numel, world, rank) for rank in range(world)]
    each = [algorithms.fused_residuals(x, plan, Residuals()) for x, plan in zip(calls[0], plans, strict=True)]
    lost = list(zip(*each, strict=True))
    ranks = emulator.World(world)
    for call, (parts, (wanted, losses)) in enumerate(zip(calls, carried(kind, legs, calls, world), strict=True)):
        out = outputs(kind, parts)
        ranks.run([ranks.job(kind, legs, parts, out, lost)], call)
        assert all(same(each, want) for each, want in zip(out, wanted, strict=True)), (kind, dtype, call)
        for leg, kept in zip(losses, lost, strict=True):
            assert all(want is None or same(each, want) for each, want in zip(kept, leg, strict=True)), (kind, call)


@pytest.mark.parametrize("kind", ["one-step", "two-step", "reduce_scatter"])
def test_residuals_are_added_to_the_next_call(kind):
    for world, dtype, bits in ((2, torch.bfloat16, 4), (3, torch.float16, 3), (3, torch.float32, 8)):
        check_carried(kind, world, 3000, dtype, Config(bits=bits).legs, strange)
    check_carried(kind, 2, 2, torch.bfloat16, AUTO, strange)


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_of_extremes_equal_the_definition(kind):
    def make(numel, dtype, seed):
        return tensor(kind, numel, dtype, seed)

    for dtype in DTYPES:
        check_carried("two-step", 2, 2500, dtype, AUTO, make)


# ---- many calls, ranks at different ones ----------------------------------------------------------------------


def mixed_jobs(ranks, count, seed, **tests):
    """Calls of all kinds and several sizes with their expected results."""
    jobs, keep = [], []
    for i in range(count):
        kind = list(emulator.KINDS)[(i * 7 + seed) % 4]
        numel = (1, 5000, 300, 20_000)[(i + seed) % 4] // ranks.world * ranks.world
        parts = [torch.randn(numel).bfloat16() for _ in range(ranks.world)]
        out = outputs(kind, parts)
        keep.append((parts, out, expected(kind, BLOCK32, parts) if numel else out))
        jobs.append(ranks.job(kind, BLOCK32, parts, out, **tests))
    return jobs, keep


def right(keep) -> bool:
    return all(same(each, want) for _, out, wants in keep for each, want in zip(out, wants, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_consecutive_calls_of_all_kinds_sizes_and_grids(seed):
    """Also calls of no values: their ranks exchange flags like all others."""
    ranks = emulator.World(2 + seed % 2, blocks=3, region=3 * 16384)
    jobs, keep = mixed_jobs(ranks, 8, seed)
    ranks.run(jobs, seed)
    assert right(keep)
    assert len({ranks.epoch(rank) for rank in range(ranks.world)}) == 1


def test_calls_stay_right_when_the_call_counter_wraps():
    ranks = emulator.World(2, epoch=2**64 - 3)
    jobs, keep = mixed_jobs(ranks, 8, 1)
    ranks.run(jobs)
    assert right(keep)
    assert 0 < ranks.epoch(0) < 100


def stalled(single_buffer: int) -> bool:
    """Rank 1 reads late in a reduce-scatter of many rounds."""
    ranks = emulator.World(2, blocks=1, region=16384)
    codecs = (Uniform(8, 8), Uniform(8, 8))
    parts = [torch.randn(80_000).bfloat16() for _ in range(2)]
    out = outputs("reduce_scatter", parts)
    job = ranks.job("reduce_scatter", codecs, parts, out, stalled_rank=1, stall=30_000, single_buffer=single_buffer)
    assert ranks.shape(job).rounds > 3
    ranks.run([job])
    return right([(parts, out, expected("reduce_scatter", codecs, parts))])


def test_a_stalled_reader_is_not_overtaken():
    assert stalled(single_buffer=0)
    assert not stalled(single_buffer=1), "negative control: with one region in place of the ring it must be"


def late(kind: str, world: int, rank: int, values: int = 2048):
    """One call in which ``rank`` begins when all others wait for it; its ranks and its shape."""
    ranks = emulator.World(world, blocks=1, region=16384)
    codecs = (Uniform(8, 8), Uniform(8, 8))
    parts = [torch.randn(values * world).bfloat16() for _ in range(world)]
    out = outputs(kind, parts)
    job = ranks.job(kind, codecs, parts, out)
    ranks.run([job], late=1 << rank)
    assert right([(parts, out, expected(kind, codecs, parts))])
    return ranks, ranks.shape(job)


@pytest.mark.parametrize("kind", emulator.KINDS)
def test_what_has_come_is_decoded_before_a_late_rank_comes(kind):
    """Sources are added in rank order; what is only decoded is taken from the own rank on down."""
    world = 4
    for rank in range(world):
        ranks, _ = late(kind, world, rank)
        for other in set(range(world)) - {rank}:
            order = [(other - k) % world for k in range(world)] if kind == "all_gather" else list(range(world))
            assert ranks.read_early(other) == set(order[: order.index(rank)]) - {other}, (rank, other)


@pytest.mark.parametrize("kind", sorted(emulator.KINDS.keys() - {"two-step"}))
def test_flags_are_not_polled_again(kind):
    """Who comes last finds all flags there and reads each once, with one look; its own it does not read at all."""
    ranks, shape = late(kind, 4, 2, 512)
    assert shape.rounds == 1
    assert ranks.polls(2) == 3
    assert not any(ranks.polls(rank, again=True) for rank in range(4))


@pytest.mark.parametrize("kind", emulator.KINDS)
def test_the_next_round_is_sent_before_the_last_leg_of_this_one_is_awaited(kind):
    """In two steps that is the gather leg, which a rank that is missing from the start does not let begin."""
    ranks, shape = late(kind, 2, 1, 80_000)
    assert shape.rounds > 3
    assert ranks.announced_early(0) == (1 if kind == "two-step" else 2)


def test_an_absent_rank_is_named():
    ranks = emulator.World(3)
    jobs, _ = mixed_jobs(ranks, 3, 2, deadline=10**6)
    ranks.run(jobs, absent=0b100)
    for rank in (0, 1):
        word = ranks.error(rank)
        assert word >> 63 == 1 and (word >> 58) & 15 == 2, "rank 2 is missing"
        assert ranks.epoch(rank) == ranks.epoch(0)
    assert ranks.error(2) == 0


def test_who_misses_a_rank_pushes_nothing_more():
    """What was decoded of the missing rank goes nowhere: others may still read what would be overwritten."""
    for kind, announced in {"two-step": 1, "one-step": 2}.items():
        ranks = emulator.World(3, blocks=1, region=16384)
        parts = [torch.randn(90_000).bfloat16() for _ in range(3)]
        out = outputs(kind, parts)
        ranks.run([ranks.job(kind, BLOCK32, parts, out, deadline=10**6)], absent=0b100)
        assert [ranks.announced_early(rank) for rank in range(3)] == [announced, announced, 0]
        assert out[0].isnan().all() and out[1].isnan().all()


# ---- the rules ------------------------------------------------------------------------------------------------


def test_the_model_has_the_rules_of_the_kernel():
    for round in (0, 1, 2, 2**63, 2**64 - 1):
        assert emulator.library().rule_region(emulator.ctypes.c_uint64(round)) == AS_BUILT.region(round)
        for ahead in (-2, -1, 0, 1, 2, 2**62):
            seen = (round + ahead) % 2**64
            words = emulator.ctypes.c_uint64(seen), emulator.ctypes.c_uint64(round)
            assert emulator.library().rule_reached(*words) == reached(seen, round, AS_BUILT.modulus)
