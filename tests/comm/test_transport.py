"""What of the transports runs without a GPU: votes, host segments, and which calls they leave to the process group."""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from specification import planned

from flashcomm_megatron.codec import Rotated, Uniform
from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.codec.base import Slices
from flashcomm_megatron.collectives import all_reduce, prepare
from flashcomm_megatron.comm import fused, shared_memory, votes
from flashcomm_megatron.comm.communicator import Call, Communicator
from flashcomm_megatron.comm.inboxes import HostInboxes
from flashcomm_megatron.comm.process_group import ProcessGroup
from flashcomm_megatron.config import Config


def _votes(rank: int, world: int) -> str:
    group = dist.group.WORLD
    assert votes.gather(bytes([rank]) * 64, group) == [bytes([r]) * 64 for r in range(world)]
    assert votes.gather(b"\0\0", group) == [b"\0\0"] * world, "zeros at the end belong to the message"
    assert votes.failure("", group) == ""
    return votes.failure("no room" if rank > 0 else "", group)


def test_one_rank_that_fails_makes_all_fall_back():
    assert spawn(_votes, 3) == ["rank 1: no room"] * 3


class FakeCuda:
    """Stands for the extension: host memory is addressed as it is."""

    @staticmethod
    def host_register(device: int, start: int, size: int) -> int:
        return start

    @staticmethod
    def host_unregister(start: int) -> None:
        pass


def _host_inboxes(rank: int, world: int) -> None:
    """What one rank writes into another's inbox is there, and no name is left."""
    inboxes = HostInboxes(FakeCuda(), 0, 8192, dist.group.WORLD)
    assert inboxes.reason == "" and len(inboxes.addresses) == world
    assert not list(shared_memory.FOLDER.glob(f"flash-comm-{os.getpid()}-*")), "the name is gone"
    for peer, pinned in enumerate(inboxes._pinned):
        pinned.mapping[100 * rank] = 10 + rank + peer
    dist.barrier()
    mine = inboxes._pinned[rank].mapping
    assert [mine[100 * peer] for peer in range(world)] == [10 + rank + peer for peer in range(world)]
    assert mine[8191] == 0
    dist.barrier()
    inboxes.unmap()
    inboxes.free()


def test_inboxes_in_host_memory_are_shared():
    spawn(_host_inboxes, 3)


def _pins_no_more_than_one(rank: int, world: int) -> tuple[str, bool]:
    before = len(os.listdir("/proc/self/fd"))
    fake, pinned = FakeCuda(), []

    def register(device: int, start: int, size: int) -> int:
        if rank == 1 and pinned:
            raise RuntimeError("no more to pin")
        pinned.append(start)
        return start

    fake.host_register, fake.host_unregister = register, pinned.remove
    inboxes = HostInboxes(fake, 0, 8192, dist.group.WORLD)
    inboxes.unmap()  # as fused.py does with what failed
    assert not pinned
    return inboxes.reason, len(os.listdir("/proc/self/fd")) == before


def test_inboxes_that_one_rank_cannot_pin_leave_nothing_open():
    assert spawn(_pins_no_more_than_one, 3) == [("rank 1: no more to pin", True)] * 3


def test_a_segment_is_for_its_user_alone():
    made = shared_memory.create(4096)
    try:
        assert (shared_memory.FOLDER / made.name).stat().st_mode & 0o777 == 0o600
        again = shared_memory.attach(made.name, 4096)
        again.mapping[7] = 42
        assert made.mapping[7] == 42
    finally:
        shared_memory.remove(made.name)
    with pytest.raises(OSError):
        shared_memory.attach(made.name, 4096)


def test_a_segment_that_does_not_fit_is_an_error_now_and_leaves_nothing():
    with pytest.raises(OSError):
        shared_memory.create(1 << 60)
    assert not list(shared_memory.FOLDER.glob(f"flash-comm-{os.getpid()}-*"))


def serving(device: str, **options) -> object:
    """What serves a call on a tensor that claims to be on ``device``; the group knows its size and nothing else."""
    config = Config(bits=4, min_bytes=0, **options)
    x = torch.zeros(64)
    plan = planned("all_reduce", x, 2, config)
    claimed = SimpleNamespace(device=torch.device(device), dtype=x.dtype)
    return fused.serving(SimpleNamespace(size=lambda: 2), claimed, plan, config.transport)  # type: ignore[arg-type]


def test_calls_that_are_left_to_the_process_group():
    assert serving("cpu") is None
    assert serving("cuda", transport="group") is None
    assert serving("cuda", recipe="mx") is None, "no fused kernel for this format"


def test_the_trial_goes_through_every_region(root):
    assert f"kRegions = {fused.REGIONS};" in (root / "csrc/cuda/protocol.h").read_text()


def has_fused(reduce, gather, dtype=torch.bfloat16, with_residuals=False, width=1 << 15, rows=1):
    slices = Slices(rows * width, width, rows * width, 1)
    return fused._kernel(reduce, gather, slices, dtype, with_residuals) is not None


@pytest.mark.skipif(extension.cuda() is None, reason="needs CUDA kernels")
def test_which_legs_have_a_fused_cuda_kernel():
    for dtype, bits in product((torch.float32, torch.float16, torch.bfloat16), range(2, 9)):
        for recipe in ("auto", "flash-v2"):
            assert has_fused(*Config(bits=bits, recipe=recipe).legs[:2], dtype)
    assert has_fused(Uniform(4, 32), Uniform(8, 32)) and not has_fused(Uniform(3, 32), Uniform(8, 32))
    assert not has_fused(Uniform(4, 32), Rotated(8, 32)), "legs of two formats"
    assert not has_fused(Uniform(4, 16384), Uniform(4, 32)), "a block of more than a tile"
    large = Rotated(4.5, 128), Rotated(5, 256)
    assert has_fused(*large) and not has_fused(*large, torch.float32), "super-blocks of 8192 values, tiles half as long"
    assert has_fused(*Config(bits=4).legs[:2], with_residuals=True), "codecs of rotated blocks keep residuals"
    assert not has_fused(Uniform(4, 32), Uniform(4, 32), with_residuals=True)


@pytest.mark.skipif(extension.cuda() is None, reason="needs CUDA kernels")
def test_fused_cuda_kernels_serve_rows_of_whole_super_blocks_alone():
    """Else values of two rows would share a top."""
    auto, v1 = Config(bits=4).legs[:2], (Uniform(4, 128), Uniform(4, 128))
    for width, of_auto, of_v1 in ((4096, True, True), (5120, False, True), (3584, False, True), (2880, False, False)):
        assert has_fused(*auto, width=width, rows=8) == of_auto and has_fused(*v1, width=width, rows=8) == of_v1, width


def test_a_group_has_a_workspace_for_each_transport(monkeypatch):
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(fused, "_make", lambda group, device, transport: made.append(transport))
    monkeypatch.setattr(fused, "_made", {})
    for transport in ("peer", "host", "peer"):
        assert fused._of("group", 0, transport) is None  # type: ignore[arg-type]
    assert made == ["peer", "host"]


def test_nothing_is_prepared_during_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(fused, "_made", {})
    with pytest.raises(RuntimeError, match="before the capture"):
        fused.prepare("group", "peer")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"collectives\.prepare\(group, config\) before the capture"):
        fused._of("group", 0, "peer")  # type: ignore[arg-type]


def _prepare(rank: int, world: int) -> list[float]:
    config = Config(bits=8, min_bytes=0)
    prepare(None, config)
    return all_reduce(torch.ones(64), None, config).tolist()


def test_prepare_is_collective_and_leaves_collectives_right():
    assert spawn(_prepare, 2) == [[2.0] * 64] * 2


def _cpu_ignores_transport(rank: int, world: int) -> torch.Tensor:
    results = [
        all_reduce(torch.arange(100.0) * (rank + 1), None, Config(bits=8, min_bytes=0, transport=transport))
        for transport in ("auto", "peer", "host", "group", "shared-memory")
    ]
    assert all(torch.equal(each, results[0]) for each in results)
    return results[0]


def test_on_the_cpu_every_transport_is_the_process_group():
    first, second = spawn(_cpu_ignores_transport, 2)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("out_sizes", "in_sizes", "splits"),
    [((32, 32), (32, 32), ([], [])), ((32, 16), (32, 32), ([32, 32], [32, 16])), ([0, 0], [0, 48], ([0, 48], [0, 0]))],
    ids=["equal-slices", "short-slice", "all-to-all-that-only-receives"],
)
def test_sizes_are_left_out_where_all_ranks_leave_them_out(monkeypatch, out_sizes, in_sizes, splits):
    """A backend may run another collective without sizes, so ranks must agree."""
    found = []
    ends = ProcessGroup.__new__(ProcessGroup)
    ends.rank, ends.world = 0, 2
    ends._backends = {"cpu": SimpleNamespace(alltoall_base=lambda inbox, outbox, *rest: found.append(rest[:2]))}
    monkeypatch.setattr(ProcessGroup, "messages", ())
    boxes = (torch.empty(sum(sizes), dtype=torch.uint8) for sizes in (out_sizes, in_sizes))
    ends.exchange(next(boxes), out_sizes, next(boxes), in_sizes, Call(1, "", 0, 1.0))
    assert found == [splits]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_rank_waits_as_long_as_its_group_does_whatever_backend_that_has(kind: str) -> None:
    """A group of NCCL alone has no backend for CPUs."""

    def backend(device: torch.device) -> SimpleNamespace:
        if device.type != kind:
            raise RuntimeError(f"No backend type associated with device type {device.type}")
        return SimpleNamespace(options=SimpleNamespace(_timeout=timedelta(seconds=77)))

    comm = Communicator.__new__(Communicator)
    group = SimpleNamespace(_get_backend=backend)
    comm._group = lambda: group  # type: ignore[assignment, return-value]
    assert comm.seconds(Config(bits=4)) == 77.0 and comm.seconds(Config(bits=4, timeout=5.0)) == 5.0
