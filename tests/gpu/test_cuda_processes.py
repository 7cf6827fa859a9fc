"""The public collectives on GPUs, one process a rank: transports peer and host, errors, streams, teardown.

Ranks share GPUs where there are fewer of them. Processes on one GPU take turns, so these calls are few and small.
"""

from __future__ import annotations

import os
import time
from itertools import product

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from specification import expected, planned, same, strange

from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.collectives import all_gather, all_reduce, prepare, reduce_scatter, stats
from flashcomm_megatron.comm import fused
from flashcomm_megatron.config import Config

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(extension.cuda() is None, reason=f"no CUDA kernels: {extension.reason()}"),
]

TRANSPORTS = ["peer", "host"]


def config_of(transport: str, bits: int = 4, algorithm: str = "auto", timeout: float | None = None) -> Config:
    return Config(
        bits=bits,
        recipe="flash-v1",
        block=32,
        min_bytes=0,
        transport=transport,
        algorithm=algorithm,
        timeout=timeout,
    )


def use_device(rank: int) -> torch.device:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _collectives(rank: int, world: int, transport: str) -> str:
    """Every collective against its specification; the inboxes that served."""
    device, group = use_device(rank), dist.group.WORLD
    for seed, numel in enumerate((8, 5000, 300_000)):
        for algorithm in ("one-step", "two-step"):
            config = config_of(transport, 4 + 4 * (seed % 2), algorithm)
            parts = [strange(numel, torch.bfloat16, seed * 10 + r) for r in range(world)]
            x = parts[rank].to(device)
            plan = planned("all_reduce", x, world, config)
            codecs = (plan.reduce, plan.gather)
            result = all_reduce(x, group, config)
            assert result is x and same(x, expected(algorithm, codecs, parts)[rank])
            assert same(all_gather(parts[rank].to(device), group, config), expected("all_gather", codecs, parts)[rank])
            wide = [part.repeat(world) for part in parts]
            found = reduce_scatter(wide[rank].to(device), group, config)
            assert same(found, expected("reduce_scatter", codecs, wide)[rank])
    made = fused.prepare(group, transport)
    assert made is not None, "the workspace must have been made"
    kind = type(made._inboxes).__name__
    fused.close(group)
    return kind


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [2, 4])
def test_collectives_of_processes_equal_their_specification(transport, world):
    served = {"peer": "PeerInboxes", "host": "HostInboxes"}[transport]
    assert spawn(_collectives, world, transport, seconds=100) == [served] * world


def _rows(rank: int, world: int) -> int:
    """Rows of which the last ranks own fewer or none, bit for bit; the calls that kernels served."""
    device, group, served = use_device(rank), dist.group.WORLD, []
    launch = fused.launch
    fused.launch = lambda *args: served.append(1) or launch(*args)
    for algorithm, rows in product(("one-step", "two-step"), (1, 4, 5)):
        config = Config(bits=4, min_bytes=0, transport="peer", algorithm=algorithm)
        parts = [strange(rows * 2048, torch.bfloat16, 10 * rows + r).view(rows, 2048) for r in range(world)]
        found = all_reduce(parts[rank].to(device), group, config)
        assert same(found.view(-1), expected(algorithm, config.legs, parts)[rank]), (algorithm, rows)
    fused.close(group)
    return len(served)


def test_rows_are_cut_as_plans_say():
    assert spawn(_rows, 3, seconds=100) == [6] * 3


def raised_behind(x: torch.Tensor, group: dist.ProcessGroup, config: Config) -> str:
    """What the next call raises behind one whose kernel gives up, even a call that is not compressed."""
    out = all_reduce(x, group, config)
    torch.cuda.synchronize()
    assert out.isnan().all() and "did not arrive" in stats()["gpu_errors"][0]
    try:
        all_reduce(x, group, Config(bits=4, min_bytes=1 << 40, transport=config.transport))
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def _one_rank_leaves(rank: int, world: int, transport: str) -> str:
    device, group, config = use_device(rank), dist.group.WORLD, config_of(transport, timeout=2.0)
    x = torch.randn(10_000, device=device)
    all_reduce(x, group, config)
    return "left" if rank == 1 else raised_behind(x, group, config)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_that_stay_name_the_one_that_left(transport):
    first, second, third = spawn(_one_rank_leaves, 3, transport, seconds=60)
    assert "rank 1 did not arrive" in first and "rank 1 did not arrive" in third and second == "left"


def _many_streams(rank: int, world: int) -> None:
    """Calls of one group on three streams in turn, with nothing between them that orders the streams."""
    device, group, config = use_device(rank), dist.group.WORLD, config_of("peer")
    streams = [torch.cuda.Stream() for _ in range(3)]
    calls = [[strange(20_000, torch.bfloat16, 10 * call + r) for r in range(world)] for call in range(6)]
    x = [parts[rank].to(device) for parts in calls]
    torch.cuda.synchronize()
    for call, each in enumerate(x):
        with torch.cuda.stream(streams[call % 3]):
            all_reduce(each, group, config)
    torch.cuda.synchronize()
    plan = planned("all_reduce", x[0], world, config)
    for each, parts in zip(x, calls, strict=True):
        assert same(each, expected(plan.algorithm, (plan.reduce, plan.gather), parts)[rank])
    fused.close(group)


def test_a_second_stream_waits_for_the_first():
    spawn(_many_streams, 2, seconds=60)


def _opposite_orders(rank: int, world: int) -> None:
    """Two groups on two streams; the ranks launch them in opposite orders, each in all blocks it may have."""
    os.environ["FLASHCOMM_STAND_IN_GPUS"] = "2"  # a rank's two grids must fit on its own GPU
    device, config = use_device(rank), config_of("peer", timeout=20.0)
    groups, streams = [dist.new_group(), dist.new_group()], [torch.cuda.Stream() for _ in range(2)]
    x = [torch.full((300_000,), rank + 1.0 + turn, device=device) for turn in range(2)]
    for group in groups:
        prepare(group, config)
    torch.cuda.synchronize()
    for turn in (0, 1) if rank == 0 else (1, 0):
        with torch.cuda.stream(streams[turn]):
            all_reduce(x[turn], groups[turn], config)
        time.sleep(0.5)  # its blocks have begun: were they all that fit, the other call's could not
    torch.cuda.synchronize()
    assert all(torch.equal(each, torch.full_like(each, 3.0 + 2 * turn)) for turn, each in enumerate(x))
    for group in groups:
        fused.close(group)


def test_two_groups_launched_in_opposite_orders():
    spawn(_opposite_orders, 2, seconds=60)


def _other_device(rank: int, world: int) -> None:
    os.environ["FLASHCOMM_STAND_IN_GPUS"] = "2"  # where the stand-in is the GPU
    torch.cuda.set_device(0)
    group, config = dist.group.WORLD, config_of("peer")
    prepare(group, config)
    torch.cuda.set_device(1)
    all_reduce(torch.ones(1000, device="cuda:0"), group, config)
    assert torch.cuda.current_device() == 1, "a call leaves the current device as it was"
    fused.close(group)
    assert torch.cuda.current_device() == 1


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 and "FLASHCOMM_CUDA_STAND_IN" not in os.environ, reason="needs two GPUs"
)
def test_the_current_device_stays():
    spawn(_other_device, 2, seconds=60)


def _graph(rank: int, world: int) -> None:
    """prepare() before the capture; the graph counts on at every replay."""
    device, group, config = use_device(rank), dist.group.WORLD, config_of("peer")
    x = torch.zeros(5000, device=device, dtype=torch.bfloat16)
    prepare(group, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_reduce(x, group, config)
    for replay in range(5):
        parts = [strange(5000, torch.bfloat16, replay * 10 + r) for r in range(world)]
        x.copy_(parts[rank])
        graph.replay()
        plan = planned("all_reduce", x, world, config)
        assert same(x, expected(plan.algorithm, (plan.reduce, plan.gather), parts)[rank])
    fused.close(group)


def test_a_captured_call_counts_on_at_every_replay():
    spawn(_graph, 2, seconds=60)


def _again_and_again(rank: int, world: int, transport: str) -> list[int]:
    device, group, config = use_device(rank), dist.group.WORLD, config_of(transport)
    used = []
    for _ in range(20):
        x = torch.ones(1000, device=device)
        assert torch.equal(all_reduce(x, group, config), torch.full_like(x, float(world)))
        fused.close(group)
        torch.cuda.synchronize()
        dist.barrier()
        used.append(torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0])
        dist.barrier()
    return used


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_workspace_made_twenty_times_leaks_nothing(transport):
    for used in spawn(_again_and_again, 2, transport, seconds=100):
        assert used[-1] - used[2] < 8 << 20


def _bounded(rank: int, world: int) -> float:
    """Seconds for 200 calls of alternating shapes."""
    device, group, config = use_device(rank), dist.group.WORLD, config_of("peer")
    started = time.monotonic()
    for call in range(200):
        x = torch.full((1 + call * 977 % 50_000,), float(rank + call), device=device)
        want = torch.full_like(x, float(world * call + sum(range(world))))
        assert torch.equal(all_reduce(x, group, config), want), call  # constants are exact at every width
    fused.close(group)
    return time.monotonic() - started


def test_two_hundred_calls_take_bounded_time():
    assert len(spawn(_bounded, 2, seconds=100)) == 2
