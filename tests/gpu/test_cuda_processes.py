"""The public collectives on GPUs, one process a rank: transports peer and host, errors, streams, teardown.

Ranks share GPUs where there are fewer of them. Processes on one GPU take turns, so these calls are few and small.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from specification import expected, same, strange

from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.collectives import all_gather, all_reduce, prepare, reduce_scatter
from flashcomm_megatron.collectives import plan as policy
from flashcomm_megatron.comm import workspace
from flashcomm_megatron.config import Config

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(extension.cuda() is None, reason=f"no CUDA kernels: {extension.reason()}"),
]

TRANSPORTS = ["peer", "host"]


def config_of(transport: str, bits: int = 4, algorithm: str = "auto") -> Config:
    return Config(bits=bits, recipe="flash-v1", block=32, min_bytes=0, transport=transport, algorithm=algorithm)


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
            plan = policy.plan("all_reduce", x, world, config)
            codecs = (plan.reduce, plan.gather)
            result = all_reduce(x, group, config)
            assert result is x and same(x, expected(algorithm, codecs, parts)[rank])
            assert same(all_gather(parts[rank].to(device), group, config), expected("all_gather", codecs, parts)[rank])
            wide = [part.repeat(world) for part in parts]
            found = reduce_scatter(wide[rank].to(device), group, config)
            assert same(found, expected("reduce_scatter", codecs, wide)[rank])
    made = workspace.prepare(group, transport)
    assert made is not None, "the workspace must have been made"
    kind = type(made._inboxes).__name__
    workspace.close(group)
    return kind


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [2, 4])
def test_collectives_of_processes(transport, world):
    served = {"peer": "PeerInboxes", "host": "HostInboxes"}[transport]
    assert spawn(_collectives, world, transport, seconds=100) == [served] * world


def raised_behind(x: torch.Tensor, group: dist.ProcessGroup, config: Config) -> str:
    """What a call raises behind one whose kernel gives up."""
    all_reduce(x, group, config)
    torch.cuda.synchronize()
    try:
        all_reduce(x, group, config)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def _one_rank_leaves(rank: int, world: int, transport: str) -> str:
    device, group, config = use_device(rank), dist.group.WORLD, config_of(transport)
    x = torch.randn(10_000, device=device)
    all_reduce(x, group, config)
    workspace.deadline = 2.0
    return "left" if rank == 1 else raised_behind(x, group, config)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_that_stay_name_the_one_that_left(transport):
    first, second, third = spawn(_one_rank_leaves, 3, transport, seconds=60)
    assert "rank 1 did not arrive" in first and "rank 1 did not arrive" in third and second == "left"


def _second_stream(rank: int, world: int) -> None:
    device, group, config = use_device(rank), dist.group.WORLD, config_of("peer")
    x = torch.randn(10_000, device=device)
    all_reduce(x, group, config)
    with torch.cuda.stream(torch.cuda.Stream()):
        with pytest.raises(RuntimeError, match="another stream"):
            all_reduce(x, group, config)
        workspace.prepare(group, "peer")
        all_reduce(x, group, config)
    torch.cuda.synchronize()
    workspace.close(group)


def test_a_second_stream_is_refused():
    spawn(_second_stream, 2, seconds=60)


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
        plan = policy.plan("all_reduce", x, world, config)
        assert same(x, expected(plan.algorithm, (plan.reduce, plan.gather), parts)[rank])
    workspace.close(group)


def test_a_captured_call():
    spawn(_graph, 2, seconds=60)


def _again_and_again(rank: int, world: int, transport: str) -> list[int]:
    device, group, config = use_device(rank), dist.group.WORLD, config_of(transport)
    used = []
    for _ in range(20):
        x = torch.ones(1000, device=device)
        assert torch.equal(all_reduce(x, group, config), torch.full_like(x, float(world)))
        workspace.close(group)
        torch.cuda.synchronize()
        dist.barrier()
        used.append(torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0])
        dist.barrier()
    return used


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_made_twenty_times_nothing_leaks(transport):
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
    workspace.close(group)
    return time.monotonic() - started


def test_two_hundred_calls():
    assert len(spawn(_bounded, 2, seconds=100)) == 2
