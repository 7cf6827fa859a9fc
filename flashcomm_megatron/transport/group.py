"""Transport over a torch process group: NCCL, gloo, or whatever backend the group has.

The one operation, :func:`exchange`, is a set of point-to-point messages posted together. It serves both legs: in the
reduce leg every peer is sent its own slice, in the gather leg every peer is sent the same payload. Over gloo this is
faster than its all_gather at every size measured (benchmarks/bench_collectives.py); over NCCL it is one grouped launch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple
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
        try:
            self.work.wait(timedelta(seconds=self.seconds))
        except RuntimeError as error:
            raise RuntimeError(
                f"flash-comm: {self.call}: no message passed between this rank and rank {self.peer} (allowed: "
                f"{self.seconds:g} s). Look for that rank's own error; if it has none, it is in another call or holds "
                f"another configuration. The process group says: {error}"
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
    awaited, so the tag is the call's own: messages of different calls never meet.
    """
    tag = TAG | (call.number % 64) << 16 | call.check  # few, for gloo keeps something of each
    me, world = group.rank(), group.size()
    messages: list[dist.P2POp] = []
    for distance in range(1, world):
        to, source = (me + distance) % world, (me - distance) % world
        if sends[to].numel():
            messages.append(dist.P2POp(dist.isend, sends[to], dist.get_global_rank(group, to), group, tag))
        if receives[source].numel():
            messages.append(dist.P2POp(dist.irecv, receives[source], dist.get_global_rank(group, source), group, tag))
    if not messages:
        return []
    works = dist.batch_isend_irecv(messages)
    if messages[0].tensor.device.type != "cpu":
        return works
    _keep(group, works, messages)
    return [Message(work, message.peer, seconds, call) for work, message in zip(works, messages, strict=True)]
