"""What can go wrong between GPUs and cannot be had from one: on stand_ins/cuda, whose calls fail when they are told to.

Run by tests/gpu/test_cuda_emulated.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from specification import carried, expected, planned, same, strange
from test_cuda_processes import _collectives, config_of, raised_behind, use_device

from flashcomm_megatron.codec import Uniform
from flashcomm_megatron.collectives import all_gather, all_reduce, prepare, reduce_scatter
from flashcomm_megatron.collectives.algorithms import Residuals
from flashcomm_megatron.comm import fused, votes
from flashcomm_megatron.comm.communicator import Communicator
from flashcomm_megatron.config import Config

MODULE = os.environ.get("FLASHCOMM_CUDA_STAND_IN")
pytestmark = pytest.mark.skipif(MODULE is None, reason="needs the stand-in for CUDA: see test_cuda_emulated.py")

if MODULE is not None:
    from cuda_ranks import Streams
    from cuda_stand_in.streams import kept

# cudaError_t of stand_ins/cuda/cuda_runtime.h; NOBODYS: the call succeeds, but maps memory that no peer writes.
WORKS, OUT_OF_MEMORY, NO_PEER_ACCESS, NOBODYS = 0, 2, 217, 600


def fault(function: str, error: int) -> None:
    """From now on ``function`` of CUDA's runtime answers ``error`` in this process."""
    ctypes.CDLL(MODULE).stand_in_fault(function.encode(), error)


# ---- the stand-in ------------------------------------------------------------------------------------------------


def _forked(rank: int, world: int) -> None:
    assert torch.cuda.device_count() == 1
    if os.fork() == 0:
        os._exit(0 if _fails(lambda: torch.ones(1, device="cuda"), "InitializationError") else 1)
    assert os.wait()[1] == 0


def _fails(run: Callable[[], Any], how: str) -> bool:
    try:
        run()
    except RuntimeError as error:
        return how in str(error)
    return False


def test_the_stand_in_refuses_what_a_gpu_would():
    x, y = torch.ones(10, device="cuda"), torch.ones(10)
    assert _fails(lambda: x + y, "same device") and torch.equal((x + 1).cpu(), y + y)
    assert torch.empty(4, device="cuda").isnan().all(), "nobody may count on what new memory holds"
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert _fails(x.sum().item, "capturing") and _fails(x.cpu, "capturing")
        assert _fails(torch.cuda.synchronize, "capturing")
    spawn(_forked, 1)


def test_memory_outlives_its_tensor_while_work_is_left():
    """A kernel that waits half a second, and a tensor nobody holds any more."""
    ranks = Streams(2)
    codecs = Uniform(4, 32), Uniform(4, 32)
    x, out = torch.ones(1000, device="cuda"), torch.empty(1000, device="cuda")
    before = len(kept)
    ranks.run(0, "one-step", codecs, x, out, deadline=0.5)
    del x
    assert len(kept) == before + 1
    torch.cuda.synchronize()
    assert not kept
    ranks.close()


# ---- making a workspace ------------------------------------------------------------------------------------------


def _fall_back(rank: int, world: int, faults: dict[str, int]) -> tuple[str, str]:
    """What rank 1's faults leave to all ranks: the inboxes of transport peer, and what was printed over two calls."""
    device, group, config = use_device(rank), dist.group.WORLD, config_of("peer")
    fused.trial_seconds = 3.0
    for function, error in faults.items() if rank == 1 else ():
        fault(function, error)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        made = fused.prepare(group, "peer")
        assert fused.prepare(group, "peer") is made
    if made is not None:
        parts = [strange(5000, torch.bfloat16, r) for r in range(world)]
        plan = planned("all_reduce", parts[0].to(device), world, config)
        result = all_reduce(parts[rank].to(device), group, config)
        assert same(result, expected(plan.algorithm, (plan.reduce, plan.gather), parts)[rank])
    fused.close(group)
    free, total = torch.cuda.mem_get_info()
    assert free == total, "what failed gave back all it had"
    return type(getattr(made, "_inboxes", None)).__name__, printed.getvalue()


@pytest.mark.parametrize(
    ("faults", "served", "said"),
    [
        ({}, "PeerInboxes", ""),
        ({"cudaIpcOpenMemHandle": NO_PEER_ACCESS}, "HostInboxes", "peer: rank 1: .*cudaErrorPeerAccessUnsupported"),
        ({"cudaMalloc": OUT_OF_MEMORY, "cudaHostRegister": 1}, "NoneType", "peer: rank 1: .*; host: rank 1: .*"),
        ({"cudaHostAlloc": OUT_OF_MEMORY}, "NoneType", "peer: rank 1: .*error words.*; host: rank 1: .*error words"),
        ({"cudaDeviceGetAttribute": 1}, "NoneType", "peer: rank 1: .*asking for the device"),
        ({"cudaIpcOpenMemHandle": NOBODYS}, "HostInboxes", "peer: rank 0: .*rank 1 did not arrive"),
    ],
    ids=["none", "no-peer-access", "neither", "late", "no-device", "not-the-peers"],
)
def test_ranks_fall_back_together_and_say_why_once(faults, served, said):
    found = spawn(_fall_back, 3, faults, seconds=60)
    assert [inboxes for inboxes, _ in found] == [served] * 3
    assert [text.count("\n") for _, text in found] == [bool(faults), 0, 0], "rank 0 alone says it, once"
    transport = {"HostInboxes": "host", "NoneType": "group"}.get(served)
    if faults:
        assert re.search(f"transport {transport} .*{said}", found[0][1]), found[0][1]


def _untried(rank: int, world: int) -> str:
    """One call over inboxes that are not the peers', by a workspace that nobody tried."""
    device, group, config = use_device(rank), dist.group.WORLD, config_of("peer", timeout=1.0)
    fused._trial = lambda made, group: ""
    fault("cudaIpcOpenMemHandle", NOBODYS)
    return raised_behind(torch.ones(1000, device=device), group, config)


def test_negative_control_inboxes_that_are_not_mapped():
    first, second = spawn(_untried, 2, seconds=60)
    assert "rank 1 did not arrive in the reduce phase" in first and "rank 0 did not arrive" in second


# ---- using one ---------------------------------------------------------------------------------------------------


def _rebuilt(rank: int, world: int) -> str:
    """Rank 1 comes too late; all rebuild, and the next call is right."""
    device, group, config = use_device(rank), dist.group.WORLD, config_of("peer", timeout=0.5)
    x = torch.ones(10_000, device=device)
    all_reduce(x, group, config_of("peer"))
    prepare(group, config)  # the ranks agree on it; rank 1 makes no call with it
    said = "" if rank == 1 else raised_behind(x.clone(), group, config)
    config = config_of("peer")
    fused.rebuild(group, "peer")
    result = all_reduce(torch.full_like(x, rank + 1.0), group, config)
    assert torch.equal(result, torch.full_like(x, world * (world + 1) / 2))
    fused.close(group)
    return said


def test_a_workspace_is_rebuilt_after_an_error():
    first, second, third = spawn(_rebuilt, 3, seconds=60)
    assert "rank 1 did not arrive" in first and "rank 1 did not arrive" in third and not second


def _carried(rank: int, world: int, transport: str) -> None:
    """Calls with a memory of what roundings lost, by the public functions."""
    device, group, residuals = use_device(rank), dist.group.WORLD, Residuals()
    votes.device = lambda group: device if transport == "group" else torch.device("cpu")
    config = Config(bits=4, min_bytes=0, transport=transport)
    calls = [[strange(9000, torch.bfloat16, 10 * call + r) for r in range(world)] for call in range(3)]
    plan = planned("all_reduce", calls[0][0].to(device), world, config)
    legs = plan.reduce, plan.gather
    for parts, (wanted, _) in zip(calls, carried(plan.algorithm, legs, calls, world), strict=True):
        result = all_reduce(parts[rank].to(device), group, config, residuals=residuals)
        assert same(result, wanted[rank])
    fused.close(group)


@pytest.mark.parametrize(("world", "transport"), [(2, "peer"), (3, "peer"), (3, "group")])
def test_residuals_are_carried_on_over_every_transport(world, transport):
    spawn(_carried, world, transport, seconds=60)


def _on_two_gpus(rank: int, world: int) -> str:
    os.environ["FLASHCOMM_STAND_IN_GPUS"] = "2"
    return _collectives(rank, world, "peer")


def test_ranks_with_a_gpu_each_reach_each_others_inboxes():
    assert spawn(_on_two_gpus, 2, seconds=100) == ["PeerInboxes"] * 2


def _on_another_gpu(rank: int, world: int) -> None:
    os.environ["FLASHCOMM_STAND_IN_GPUS"] = "2"
    prepare(dist.group.WORLD, config_of("peer"))  # on GPU 0: nobody has chosen another yet
    with pytest.raises(RuntimeError, match=r"made on GPU 0.*tensor on GPU 1\. Call torch\.cuda\.set_device\(1\)"):
        all_reduce(torch.ones(1000, device="cuda:1"), dist.group.WORLD, config_of("peer"))
    fused.close(dist.group.WORLD)


def test_a_tensor_on_another_gpu_than_the_workspace_is_refused():
    spawn(_on_another_gpu, 2, seconds=60)


# ---- the default path: codec kernels, and messages of the process group -------------------------------------------


def _over_the_group(rank: int, world: int) -> None:
    """Gloo in the place of NCCL: it moves what the stand-in's tensors hold."""
    device, group = use_device(rank), dist.group.WORLD
    votes.device = lambda group: device
    Communicator.of(group)._over_group._backends["cuda"] = group  # torch's dispatcher knows what they are
    for seed, recipe in enumerate(("auto", "flash-v1", "flash-v2")):
        for algorithm in ("one-step", "two-step"):
            config = Config(bits=4, recipe=recipe, min_bytes=0, algorithm=algorithm)
            parts = [strange(30_000, torch.bfloat16, seed * 10 + r) for r in range(world)]
            x = parts[rank].to(device)
            plan = planned("all_reduce", x, world, config)
            codecs = plan.reduce, plan.gather
            assert same(all_reduce(x, group, config), expected(algorithm, codecs, parts)[rank])
        gathered = planned("all_gather", parts[rank].to(device), world, config)
        want = expected("all_gather", (gathered.reduce, gathered.gather), parts)[rank]
        assert same(all_gather(parts[rank].to(device), group, config), want)
        scattered = planned("reduce_scatter", parts[rank].to(device), world, config)
        want = expected("reduce_scatter", (scattered.reduce, scattered.gather), parts)[rank]
        assert same(reduce_scatter(parts[rank].to(device), group, config), want)


def test_over_the_process_group_codec_kernels_serve():
    spawn(_over_the_group, 3, seconds=60)
