"""Transport over a torch process group: NCCL, gloo, or whatever backend the group has.

The one operation, :func:`exchange`, is a set of point-to-point messages posted together. It serves both legs: in the
reduce leg every peer is sent its own slice, in the gather leg every peer is sent the same payload. Over gloo this is
faster than its all_gather at every size measured (benchmarks/bench_collectives.py); over NCCL it is one grouped launch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from .link import Call, Transfer

TAG = 0x7C << 24  # keeps these messages apart from a user's own point-to-point traffic on the same group


class Message(NamedTuple):
    """One message in main memory, which its peer has ``seconds`` to take or to send."""

    work: dist.Work
    peer: int
    seconds: float
    call: Call

    def wait(self) -> None:
        """Block until it was delivered; RuntimeError naming the peer if it was not."""
        with _naming(self.peer, self.seconds, self.call):
            self.work.wait(timedelta(seconds=self.seconds))


@contextmanager
def _naming(peer: int, seconds: float, call: Call) -> Iterator[None]:
    """Let the process group's errors name the call and the rank."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"flash-comm: {call}: no message passed between this rank and rank {peer} (allowed: {seconds:g} s). Look "
            "for that rank's own error; if it has none, it is in another call or holds another configuration. The "
            f"process group says: {error}"
        ) from error


_under_way: WeakKeyDictionary[dist.ProcessGroup, deque[tuple[list[dist.Work], list[Tensor]]]] = WeakKeyDictionary()


def _keep(group: dist.ProcessGroup, works: list[dist.Work], messages: list[dist.P2POp]) -> None:
    """Let messages live until they are delivered, also those whose handle is dropped: their peers still expect them."""
    kept = _under_way.setdefault(group, deque())
    while kept and all(work.is_completed() for work in kept[0][0]):
        kept.popleft()
    kept.append((works, [message.tensor for message in messages]))


def exchange(
    sends: Sequence[Tensor], receives: Sequence[Tensor], group: dist.ProcessGroup, seconds: float, call: Call
) -> Sequence[Transfer]:
    """Send ``sends[r]`` to rank r and receive ``receives[r]`` from it, for every other rank r of ``group``.

    All tensors are contiguous uint8; an empty one is neither sent nor awaited, so both sides must know sizes.
    Returns handles; the tensors must stay alive and untouched until each was waited for. ``seconds`` and ``call`` serve
    messages in main memory; NCCL has its own watchdog. Gloo ends the process when a message's length is not the one
    awaited, so the tag is the call's and the length's own: messages that differ in either never meet.
    """
    me, world = group.rank(), group.size()
    messages: list[dist.P2POp] = []

    def post(what: Callable[..., Any], tensor: Tensor, rank: int) -> None:
        if tensor.numel():
            messages.append(dist.P2POp(what, tensor, dist.get_global_rank(group, rank), group, _tag(call, tensor)))

    for distance in range(1, world):
        to, source = (me + distance) % world, (me - distance) % world
        post(dist.isend, sends[to], to)
        post(dist.irecv, receives[source], source)
    if not messages:
        return []
    if messages[0].tensor.device.type != "cpu":
        return dist.batch_isend_irecv(messages)
    works: list[dist.Work] = []
    _keep(group, works, messages)
    for message in messages:  # one by one: posting fails as well where a rank is gone
        with _naming(message.peer, seconds, call):
            works.append(message.op(message.tensor, message.peer, group, message.tag))
    return [Message(work, message.peer, seconds, call) for work, message in zip(works, messages, strict=True)]


def _tag(call: Call, message: Tensor) -> int:
    """31 bits: ours, six of the call's number, and sixteen of what it is and of how long the message is."""
    length = message.numel() * 2654435761 >> 16 & 0xFFFF  # Knuth's multiplicative hash: near lengths lie far apart
    return TAG | (call.number % 64) << 16 | (call.check ^ length)
