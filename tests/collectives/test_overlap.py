"""Asynchronous collectives are at work from their start: all their legs travel before anybody waits."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from patience import patient
from ranks import spawn
from torch import Tensor

from flashcomm_megatron import collectives
from flashcomm_megatron.collectives import handle
from flashcomm_megatron.config import Config


def part(rank: int, seed: int) -> Tensor:
    return torch.randn(64, 320, generator=torch.Generator().manual_seed(10 * seed + rank)).bfloat16()


def overlapped(rank: int, world: int, transport: str) -> list[bool]:
    """Two sums posted, a weight gradient computed, and what was there before wait(); then everything compared."""
    config = Config(bits=4, min_bytes=0, transport=transport, timeout=60)
    expected = [collectives.all_reduce(part(rank, seed), None, config) for seed in range(3)]
    dist.barrier()
    handles = [collectives.all_reduce(part(rank, seed), None, config, async_op=True) for seed in range(2)]
    x = torch.randn(256, 256)
    for _ in range(20):
        x = torch.tanh(x @ x.T)  # the weight gradient
    deadline = time.monotonic() + patient(20)
    while not all(handle.is_completed() for handle in handles) and time.monotonic() < deadline:
        time.sleep(0.01)
    done = [handle.is_completed() for handle in handles]
    behind = collectives.all_reduce(part(rank, 2), None, config)  # in the same order on every rank, whoever is slow
    assert all(torch.equal(handle.wait(), sum_) for handle, sum_ in zip(handles, expected, strict=False))
    assert torch.equal(behind, expected[2])
    return done


@pytest.mark.parametrize("transport", ["shared-memory", "group"])
def test_both_legs_travel_before_anybody_waits(transport: str) -> None:
    assert spawn(overlapped, 4, transport) == [[True, True]] * 4


def in_orders_of_their_own(rank: int, world: int, transport: str) -> None:
    config = Config(bits=4, min_bytes=0, transport=transport, timeout=60)
    expected = [collectives.all_reduce(part(rank, seed), None, config) for seed in range(4)]
    handles = [collectives.all_reduce(part(rank, seed), None, config, async_op=True) for seed in range(4)]
    for number in range(4) if rank % 2 else reversed(range(4)):
        assert torch.equal(handles[number].wait(), expected[number])


@pytest.mark.parametrize("transport", ["shared-memory", "group"])
def test_ranks_may_wait_in_any_order(transport: str) -> None:
    spawn(in_orders_of_their_own, 3, transport)


def interrupted(rank: int, world: int) -> str:
    """A rank that never comes is named by wait(), and by every later wait()."""
    config = Config(bits=4, min_bytes=0, transport="shared-memory", timeout=1.0)
    collectives.all_reduce(part(rank, 0), None, config)
    if rank == 1:
        time.sleep(4)
        return ""
    handle = collectives.all_reduce(part(rank, 0), None, config, async_op=True)
    with pytest.raises(RuntimeError) as error:
        handle.wait()
    with pytest.raises(RuntimeError, match="rank 1"):
        handle.wait()
    return str(error.value)


def test_a_missing_rank_is_named_by_wait() -> None:
    first, _ = spawn(interrupted, 2, lost=[1])
    assert "rank 1 neither sent nor took anything for 1 s" in first


def lengths_that_do_not_divide(rank: int, world: int) -> None:
    for least in (0, 1 << 30):
        with pytest.raises(ValueError, match=r"first dimension of .* is not a multiple of 2 ranks"):
            collectives.reduce_scatter(torch.ones(3, 64), None, Config(bits=4, min_bytes=least))


def test_the_same_mistake_is_the_same_error_whatever_the_size() -> None:
    spawn(lengths_that_do_not_divide, 2)


class OnGpu:
    """A tensor on a GPU as a handle sees it."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self) -> None:
        self.noted: list[object] = []

    def record_stream(self, stream: object) -> None:
        self.noted.append(stream)


def test_what_a_side_stream_uses_is_noted_with_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a tensor that its owner drops early is given away while the collective still reads it."""
    aside = SimpleNamespace(wait_stream=lambda _: None, record_event=lambda: None)
    monkeypatch.setattr(handle, "side_stream", lambda device: aside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(handle.counters, "count_quantized", lambda *_: None)
    x, out = OnGpu(), OnGpu()
    started = handle.Handle(iter(()), out, None, None).start(x)  # type: ignore[arg-type]
    assert started.is_completed() and x.noted == out.noted == [aside]
