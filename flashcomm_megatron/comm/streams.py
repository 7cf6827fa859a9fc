"""Transport for tensors in main memory: byte streams between ranks, moved by the ranks themselves (csrc/cpu/streams.h).

Inside a machine they go through shared memory: every rank has a segment with a ring for each other rank; a message is
copied in by its sender and out by its receiver, without a system call unless somebody sleeps. Between machines they are
TCP connections. Frames name the call, so that ranks that have got out of step hear of it at once, and a rank that is
gone is noticed within a fraction of a second.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from socket import socket
from types import ModuleType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ..codec import native as extension
from . import segment, sockets, topology, votes
from .link import Call
from .segment import Segment

RING_BYTES = 2 << 20  # of a rank's rings together: they stay in a cache, and a small /dev/shm holds many groups'
PAGE = 4096
WHAT_BYTES = 55  # of a frame: csrc/cpu/streams.h

REASONS = {
    1: "rank {peer} neither sent nor took anything for {seconds:g} s. Is it stuck, or in another branch?",
    2: "the process of rank {peer} has ended. Look for its own error.",
    3: "rank {peer} has given up. Look for its own error, which came first.",
    4: "rank {peer} is in another call ({theirs}): every rank must make the same calls, in the same "
    "order, with the same configuration.",
    6: "rank {peer} has closed its connection: its process has ended or it has given up. Look for its own error.",
}
LENGTHS = (
    "rank {peer} is in the same call but sends another length than the {awaited} bytes awaited from it: what one "
    "rank sends and the other awaits (the splits of an all-to-all) must agree."
)


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
    """This rank's ends of the streams to all other ranks of ``group``; ``reason``: why there are none."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks = dist.get_process_group_ranks(group)
        self.native: Any = None
        self._process = os.getpid()
        self._under_way: deque[tuple[Any, Sequence[Tensor], Sequence[Tensor]]] = deque()
        self._segments: dict[int, Segment] = {}
        self._connections: dict[int, socket] = {}
        module = extension.module()
        self.reason = votes.failure("" if module else "the compiled extension is missing", group)
        if module is None or self.reason:
            return
        nodes = topology.nodes(group)
        near = [rank for rank, node in enumerate(nodes) if node == nodes[group.rank()]]
        if len(set(nodes)) < len(nodes):
            size = module.segment_bytes(len(self.ranks), capacity(len(self.ranks)))
            self._segments, self.reason = segment.share(size, group, near)
        if len(set(nodes)) > 1 and not self.reason:
            self._connections, self.reason = sockets.connect(group, sorted({*range(len(nodes))} - {*near}))
        if self.reason:
            self._close()
        else:
            self.native = self._connect(module, group.rank())

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
        ends = [(0, -1, -1)] * len(self.ranks)  # by rank: its segment's address, the lock on it, a connection
        for rank, each in self._segments.items():
            ends[rank] = each.address, each.descriptor if rank != me else -1, -1
        for rank, connection in self._connections.items():
            ends[rank] = 0, -1, connection.fileno()
        return module.Streams(me, ends, capacity(len(self.ranks)))

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        self.native = None
        for memory in self._segments.values():
            memory.close()
        for connection in self._connections.values():
            connection.close()
        self._segments, self._connections = {}, {}


def capacity(world: int) -> int:
    """Bytes of one ring, of a rank to another one, among ``world`` ranks."""
    return max(RING_BYTES // world // PAGE, 16) * PAGE
