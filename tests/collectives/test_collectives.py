"""Collectives over gloo: equal to the three-line specification, identical on every rank, on any shape and world."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from every_collective import DTYPES, SHAPES, every_collective, expected_all_reduce, part
from ranks import spawn

from flashcomm_megatron.collectives import all_gather, all_reduce, reduce_scatter
from flashcomm_megatron.comm.communicator import Communicator
from flashcomm_megatron.config import Config
from flashcomm_megatron.observe import counters

CONFIGS = [
    Config(bits=4, min_bytes=0),
    Config(bits=8, min_bytes=0, algorithm="two-step"),
    Config(bits=3, min_bytes=0, block=64, algorithm="one-step"),
    Config(bits=6, recipe="flash-v1", min_bytes=0),
]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_collectives_equal_their_specification(world):
    assert spawn(every_collective, world, CONFIGS) == [len(CONFIGS) * len(SHAPES) * 3] * world


@pytest.mark.parametrize("world", [1, 5, 8])
def test_ranks_of_other_worlds_agree(world):
    assert len(spawn(_ranks_agree, world, 2)) == world


def _ranks_agree(rank: int, world: int, rounds: int) -> None:
    """Every rank holds the same bits after all_reduce, whatever the data."""
    for seed in range(rounds):
        for dtype in DTYPES:
            for algorithm in ("one-step", "two-step"):
                config = Config(bits=2 + seed % 7, min_bytes=0, algorithm=algorithm)
                x = all_reduce(part(rank, (5, 77), dtype, seed), None, config).contiguous()
                everyone = [torch.empty_like(x) for _ in range(world)]
                dist.all_gather(everyone, x)
                assert all(torch.equal(x.view(torch.uint8), each.view(torch.uint8)) for each in everyone)


def _shapes_and_views(rank: int, world: int) -> None:
    config = Config(bits=8, min_bytes=0)
    base = part(rank, (40, 30), torch.float32)
    view = base.t()
    parts = [part(r, (40, 30), torch.float32).t().contiguous() for r in range(world)]
    result = all_reduce(view, None, config)
    assert torch.equal(result, expected_all_reduce(config, parts))
    assert torch.equal(base, part(rank, (40, 30), torch.float32)), "a non-contiguous input stays as it was"

    empty = torch.empty(0, 5)
    assert all_reduce(empty, None, config).shape == (0, 5)
    assert all_gather(empty, None, config).shape == (0, 5)
    assert reduce_scatter(empty, None, config).shape == (0, 5)

    scalar = all_reduce(torch.tensor(2.5), None, config)
    assert scalar.item() == 2.5 * world
    with pytest.raises(ValueError, match="not a multiple of 2 ranks"):
        reduce_scatter(torch.zeros(3, 4), None, config)
    with pytest.raises(ValueError, match="expected a contiguous"):
        all_gather(torch.zeros(3, 4), None, config, out=torch.zeros(3, 4))


def test_views_scalars_and_empty_tensors():
    spawn(_shapes_and_views, 2)


def _async(rank: int, world: int) -> None:
    for algorithm in ("one-step", "two-step"):
        config = Config(bits=4, min_bytes=0, algorithm=algorithm)
        parts = [part(r, (6, 50), torch.bfloat16) for r in range(world)]
        first, second = parts[rank].clone(), parts[rank].clone() * 2
        one = all_reduce(first, None, config, async_op=True)
        two = all_reduce(second, None, config, async_op=True)
        doubled = expected_all_reduce(config, [2 * each for each in parts])
        assert torch.equal(two.wait(), doubled)
        assert torch.equal(one.wait(), expected_all_reduce(config, parts))
        assert torch.equal(one.wait(), first), "waiting twice is allowed"
    integers = torch.arange(100) + rank
    assert torch.equal(all_reduce(integers, None, config, async_op=True).wait(), 2 * torch.arange(100) + 1)


def test_handles_finish_the_arithmetic_in_any_order():
    spawn(_async, 2)


def _nan_and_inf(rank: int, world: int, bad: float) -> None:
    for algorithm in ("one-step", "two-step"):
        config = Config(bits=4, recipe="flash-v1", min_bytes=0, block=32, algorithm=algorithm)
        x = part(rank, (640,), torch.float16)
        if rank == 1:
            x[300] = bad
        result = all_reduce(x, None, config)
        assert not result[288:320].isfinite().any(), "the block of the bad value is lost as a whole"
        assert result[:288].isfinite().all() and result[320:].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_of_one_rank_reach_every_rank(bad):
    spawn(_nan_and_inf, 3, bad)


def _overflow(rank: int, world: int) -> None:
    x = torch.full((64,), 60000.0, dtype=torch.float16)
    assert all_reduce(x, None, Config(bits=8, min_bytes=0)).isinf().all()


def test_a_sum_that_overflows_is_infinite():
    spawn(_overflow, 2)


def _deferred(rank: int, world: int) -> dict:
    counters.reset_stats()
    config = Config(bits=4, min_bytes=1000)
    all_reduce(torch.ones(10), None, config)
    all_reduce(torch.ones(1000, dtype=torch.int64), None, config)
    all_reduce(torch.ones(1000, dtype=torch.float64), None, config)
    all_reduce(torch.ones(0), None, config)
    x = torch.ones(1000) * (rank + 1)
    assert torch.equal(all_reduce(x, None, config), torch.full((1000,), 3.0))
    return counters.stats()


def test_what_is_deferred_is_exact_and_counted_with_its_reason():
    for counted in spawn(_deferred, 2):
        assert counted["calls"] == 5 and counted["quantized"] == 1
        assert counted["deferred"] == {"below 1000 bytes": 1, "dtype int64": 1, "dtype float64": 1, "empty": 1}


def _bytes(rank: int, world: int, algorithm: str) -> tuple[int, int]:
    """wire_bytes as counted, against the sizes of the tensors really handed to the process group."""
    sent = []

    class Counting:
        """The process group, whose messages are noted."""

        def __getattr__(self, name):
            return getattr(dist.group.WORLD, name)

        def send(self, tensors, *args):
            sent.append(tensors[0].numel())
            return dist.group.WORLD.send(tensors, *args)

    config = Config(bits=5, min_bytes=0, algorithm=algorithm, transport="group")
    all_reduce(torch.empty(0), None, config)  # the ranks compare configurations
    counting = Counting()
    Communicator.of(dist.group.WORLD)._over_group._group = lambda: counting
    counters.reset_stats()
    all_reduce(part(rank, (1111,), torch.bfloat16), None, config)
    all_reduce(part(rank, (10, 111), torch.bfloat16), None, config)
    reduce_scatter(part(rank, (world * 3, 111), torch.bfloat16), None, config)
    all_gather(part(rank, (7, 111), torch.bfloat16), None, config)
    return counters.stats()["wire_bytes"], sum(sent)


@pytest.mark.parametrize("algorithm", ["one-step", "two-step"])
def test_counted_bytes_are_the_bytes_sent(algorithm):
    for counted, sent in spawn(_bytes, 3, algorithm):
        assert counted == sent > 0


def _different_configs(rank: int, world: int) -> str:
    with pytest.raises(RuntimeError) as error:
        all_reduce(torch.ones(5000), None, Config(bits=4 + rank))
    return str(error.value)


def test_ranks_with_different_configs_are_refused_with_both_shown():
    for message in spawn(_different_configs, 2):
        assert "rank 0" in message and "bits=4" in message and "rank 1" in message and "bits=5" in message


def _subgroups(rank: int, world: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    config, mine = Config(bits=8, min_bytes=0), groups[rank // 2]
    peers = [part(r, (300,), torch.float32) for r in (rank // 2 * 2, rank // 2 * 2 + 1)]
    assert torch.equal(all_reduce(part(rank, (300,), torch.float32), mine, config), expected_all_reduce(config, peers))


def test_two_groups_at_once_do_not_mix():
    spawn(_subgroups, 4)


def _broken_handle(rank: int, world: int) -> list[str]:
    from flashcomm_megatron.collectives import ALGORITHMS

    def steps(*args: object) -> object:
        raise ValueError("broken")
        yield

    ALGORITHMS["one-step"] = steps
    handle = all_reduce(torch.ones(5000), None, Config(bits=4), async_op=True)
    said = []
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            handle.wait()
        said.append(str(error.value))
    return said


def test_an_error_is_raised_again_by_a_second_wait() -> None:
    assert spawn(_broken_handle, 2) == [["broken", "broken"]] * 2


def _single_values(rank: int, world: int) -> list[torch.Tensor]:
    x = torch.tensor(1.0 + rank)
    return [all_gather(x, None, Config(bits=8, min_bytes=least, transport="group")) for least in (0, 1 << 20)]


def test_a_tensor_without_dimensions_is_gathered_deferred_or_not():
    for compressed, deferred in spawn(_single_values, 2):
        assert torch.equal(compressed, torch.tensor([1.0, 2.0])) and torch.equal(deferred, compressed)
