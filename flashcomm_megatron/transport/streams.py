"""Transport for tensors in main memory between the ranks of one machine: byte streams through shared memory.

Every rank has a segment with a ring for each other rank (csrc/streams.h); a message is copied in by its sender and out
by its receiver, without a system call unless somebody sleeps. Frames name the call, so that ranks that have got out of
step hear of it at once, and a rank that is gone is noticed within a fraction of a second.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from .. import extension
from . import segment, topology, votes
from .link import Call
from .segment import Segment

RING_BYTES = 512 << 10  # for each ordered pair of ranks: fits the second-level cache, and two ranks copy at once
WHAT_BYTES = 55  # of a frame: csrc/streams.h

REASONS = {
    1: "rank {peer} neither sent nor took anything for {seconds:g} s. Is it stuck, or in another branch?",
    2: "the process of rank {peer} has ended. Look for its own error.",
    3: "rank {peer} has given up. Look for its own error, which came first.",
    4: "rank {peer} is in another call ({theirs}): every rank must make the same calls, in the same "
    "order, with the same configuration.",
}
LENGTHS = "rank {peer} is in the same call but sends another length than the {awaited} bytes awaited from it: what one "
LENGTHS += "rank sends and the other awaits (the splits of an all-to-all) must agree."


class Exchange(NamedTuple):
    """All messages of one exchange. ``wait()`` moves them."""

    streams: Streams
    handle: Any
    seconds: float
    call: Call
    awaited: Sequence[tuple[int, int]]  # address and bytes, by rank

    def wait(self) -> None:
        """Block until all are delivered; RuntimeError naming the rank that failed, and every later call's as well."""
        failure, peer, theirs = self.streams.native.wait(self.handle, self.seconds)
        if failure:
            is_alike = theirs == str(self.call)[:WHAT_BYTES]
            reason = (LENGTHS if is_alike else REASONS[failure]).format(
                peer=self.streams.ranks[peer], seconds=self.seconds, theirs=theirs, awaited=self.awaited[peer][1]
            )
            raise RuntimeError(f"flash-comm: {self.call}: {reason} This group's streams are closed to further calls.")


class Streams:
    """This rank's ends of the streams to the ranks of ``group`` on its machine; ``reason``: why there are none."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks = dist.get_process_group_ranks(group)
        self.native: Any = None
        self._process = os.getpid()
        self._under_way: deque[tuple[Any, Sequence[Tensor], Sequence[Tensor]]] = deque()
        self._segments: dict[int, Segment] = {}
        module = extension.module()
        self.reason = votes.failure("" if module else "the compiled extension is missing", group)
        if module is not None and not self.reason:
            size = module.Streams.segment_bytes(len(self.ranks), RING_BYTES)
            nodes = topology.nodes(group)
            near = [rank for rank, node in enumerate(nodes) if node == nodes[group.rank()]]
            self._segments, self.reason = segment.share(size, group, near)
        if module is not None and not self.reason:
            self.native = self._connect(module, group.rank())

    @property
    def reaches_all(self) -> bool:
        """Whether every rank of the group is at the other end of one."""
        return len(self._segments) == len(self.ranks)

    def exchange(
        self, sends: Sequence[Tensor], receives: Sequence[Tensor], seconds: float, call: Call
    ) -> list[Exchange]:
        """Post messages, as :func:`group.exchange` does; the tensors live until they are delivered."""
        if os.getpid() != self._process:
            raise RuntimeError(f"flash-comm: {call}: called in a forked child of a rank; only the rank itself can.")
        awaited = [(each.data_ptr(), each.numel()) for each in receives]
        leaving = [(each.data_ptr(), each.numel()) for each in sends]
        handle = self.native.start(leaving, awaited, str(call)[:WHAT_BYTES])
        while self._under_way and not self._under_way[0][0].open:
            self._under_way.popleft()
        if handle.open:
            self._under_way.append((handle, sends, receives))
        return [Exchange(self, handle, seconds, call, awaited)]

    def _connect(self, module: ModuleType, me: int) -> Any:
        addresses, locks = [0] * len(self.ranks), [-1] * len(self.ranks)
        for rank, each in self._segments.items():
            addresses[rank], locks[rank] = each.address, each.descriptor if rank != me else -1
        return module.Streams(me, addresses, locks, RING_BYTES)

    def __del__(self) -> None:
        self.native = None
        for each in self._segments.values():
            each.close()
