"""What of the transports runs without a GPU: votes, host segments, and which calls they leave to the process group."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import spawn

from flashcomm_megatron import extension, policy
from flashcomm_megatron.collectives import all_reduce
from flashcomm_megatron.config import Config
from flashcomm_megatron.transport import host, segment, votes, workspace


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
    inboxes = host.HostInboxes(FakeCuda(), 0, 8192, dist.group.WORLD)
    assert inboxes.reason == "" and len(inboxes.addresses) == world
    assert not list(segment.FOLDER.glob(f"flash-comm-{os.getpid()}-*")), "the name is gone"
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
    inboxes = host.HostInboxes(fake, 0, 8192, dist.group.WORLD)
    inboxes.unmap()  # as workspace.py does with what failed
    assert not pinned
    return inboxes.reason, len(os.listdir("/proc/self/fd")) == before


def test_inboxes_that_one_rank_cannot_pin_leave_nothing_open():
    assert spawn(_pins_no_more_than_one, 3) == [("rank 1: no more to pin", True)] * 3


def test_a_segment_is_for_its_user_alone():
    made = segment.create(4096)
    try:
        assert (segment.FOLDER / made.name).stat().st_mode & 0o777 == 0o600
        again = segment.attach(made.name, 4096)
        again.mapping[7] = 42
        assert made.mapping[7] == 42
    finally:
        segment.remove(made.name)
    with pytest.raises(OSError):
        segment.attach(made.name, 4096)


def test_a_segment_that_does_not_fit_is_an_error_now_and_leaves_nothing():
    with pytest.raises(OSError):
        segment.create(1 << 60)
    assert not list(segment.FOLDER.glob(f"flash-comm-{os.getpid()}-*"))


def serving(device: str, **options) -> object:
    """What serves a call on a tensor that claims to be on ``device``; the group knows its size and nothing else."""
    config = Config(bits=4, min_bytes=0, **options)
    x = torch.zeros(64)
    plan = policy.plan("all_reduce", x, 2, config)
    claimed = SimpleNamespace(device=torch.device(device), dtype=x.dtype)
    return workspace.serving(SimpleNamespace(size=lambda: 2), claimed, plan, config.transport)  # type: ignore[arg-type]


def test_calls_that_are_left_to_the_process_group():
    assert serving("cpu") is None
    assert serving("cuda", transport="group") is None
    assert serving("cuda", recipe="mx") is None, "no fused kernel for this format"


@pytest.mark.skipif(extension.cuda() is None or torch.cuda.is_available(), reason="needs CUDA kernels and no GPU")
def test_a_fused_kernel_is_asked_for_its_legs():
    cuda = extension.cuda()
    assert cuda is not None
    assert all(cuda.has_collective(bits, bits, dtype) for bits in range(2, 9) for dtype in range(3))
    assert cuda.has_collective(4, 8, 2) and not cuda.has_collective(3, 8, 2)
    assert not workspace._has_kernel((0, 4, 16384), (0, 4, 32), torch.bfloat16), "a block of more than a tile"


def _cpu_ignores_transport(rank: int, world: int) -> torch.Tensor:
    results = [
        all_reduce(torch.arange(100.0) * (rank + 1), None, Config(bits=8, min_bytes=0, transport=transport))
        for transport in ("auto", "peer", "host", "group")
    ]
    assert all(torch.equal(each, results[0]) for each in results)
    return results[0]


def test_on_the_cpu_every_transport_is_the_process_group():
    first, second = spawn(_cpu_ignores_transport, 2)
    assert torch.equal(first, second)
