"""Messages between CPU ranks of one machine: through shared memory, moved by the ranks themselves (csrc/cpu/streams.h).

Every rank has a segment with a ring for each other rank; a message is copied in by its sender and out by its receiver,
without a system call unless somebody sleeps. Frames name the call, so that ranks that have got out of step hear of it
at once, and a rank whose process has ended is noticed within a fraction of a second.

A segment is a file in /dev/shm that only its user can open, with an unguessable name. The name is taken away as soon as
every process has mapped it, so nothing stays behind however a process ends. Its owner holds a lock on it for as long as
it lives.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from ..codec import native
from . import stalls, votes

if TYPE_CHECKING:
    from .communicator import Call

FOLDER = Path("/dev/shm")
RING_BYTES = 2 << 20  # of a rank's rings together: they stay in a cache, and a small /dev/shm holds many groups'
PAGE = 4096

REASONS = {  # by enum Failure of csrc/cpu/ring.h
    1: "rank {peer} neither sent nor took anything for {seconds:g} s. Is it stuck, or in another branch?",
    2: "the process of rank {peer} has ended. Look for its own error.",
    3: "rank {peer} has given up. Look for its own error, which came first.",
    4: "rank {peer} is in another call ({theirs}): every rank must make the same calls, in the same "
    "order, with the same configuration.",
}
IMPATIENT = 6
LENGTHS = (
    "rank {peer} is in the same call but sends another length than the {awaited} bytes awaited from it: what one "
    "rank sends and the other awaits (the splits of an all-to-all) must agree."
)


# ---- messages ---------------------------------------------------------------------------------------------------


class Posted:
    """The messages of one exchange."""

    def __init__(self, ends: SharedMemory, handle: Any, call: Call, sizes: Sequence[int]) -> None:
        self._ends, self._handle, self._call, self._sizes = ends, handle, call, sizes

    def wait(self) -> None:
        """Block until all are delivered; RuntimeError naming the rank that failed, and every later call's as well."""
        seconds, failed = self._call.seconds, (IMPATIENT, 0, "")
        while failed is not None and failed[0] == IMPATIENT:
            failed = self._ends.native.wait(self._handle, seconds, stalls.PATIENCE)
            seconds -= stalls.PATIENCE
            if failed is not None and self._ends.stopped:
                raise RuntimeError(f"flash-comm: {self._call}: {self._ends.stopped}")
        if failed is not None:
            raise self._error(*failed)

    def _error(self, failure: int, peer: int, theirs: str) -> RuntimeError:
        self._ends.has_failed = True
        is_alike = theirs == str(self._call)
        reason = (LENGTHS if is_alike else REASONS[failure]).format(
            peer=self._ends.ranks[peer], seconds=self._call.seconds, theirs=theirs, awaited=self._sizes[peer]
        )
        return RuntimeError(f"flash-comm: {self._call}: {reason} This group's streams are closed to further calls.")


class SharedMemory:
    """A transport (communicator.py): this rank's ends of the streams to all other ranks of ``group``; ``reason``: why
    there are none."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.world = group.rank(), group.size()
        self.ranks = dist.get_process_group_ranks(group)
        self.native: Any = None
        self.has_failed, self.stopped = False, ""  # whether a wait ended with an error; why no message will arrive
        self._process = os.getpid()
        self._under_way: deque[tuple[Any, Sequence[Tensor]]] = deque()  # and buffers, which live until delivered
        self._segments: list[Segment] = []
        module = native.module()
        self.reason = votes.failure("" if module else "the compiled extension is missing", group)
        if module is None or self.reason:
            return
        ring = max(RING_BYTES // self.world // PAGE, 16) * PAGE
        self._segments, self.reason = share(module.segment_bytes(self.world, ring), group)
        if not self.reason:
            locks = [-1 if rank == self.rank else each.descriptor for rank, each in enumerate(self._segments)]
            ends = [(each.address, lock) for each, lock in zip(self._segments, locks, strict=True)]
            self.native = module.Streams(self.rank, ends, ring)

    def exchange(
        self, outbox: Tensor, out_sizes: Sequence[int], inbox: Tensor, in_sizes: Sequence[int], call: Call
    ) -> Posted:
        self._refuse_children(call)
        addresses = outbox.data_ptr(), out_sizes, inbox.data_ptr(), in_sizes
        handle = self.native.exchange(*addresses, call.number, call.title)
        self._keep(handle, (outbox, inbox))
        return Posted(self, handle, call, in_sizes)

    def gather(self, inbox: Tensor, own: Tensor, call: Call) -> Posted:
        self._refuse_children(call)
        size = own.numel()
        handle = self.native.gather(self.rank, inbox.data_ptr(), size, self.world, call.number, call.title)
        self._keep(handle, (inbox,))
        return Posted(self, handle, call, [size] * self.world)

    def _refuse_children(self, call: Call) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(f"flash-comm: {call}: called in a forked child of a rank; only the rank itself can.")

    def _keep(self, handle: Any, buffers: Sequence[Tensor]) -> None:
        while self._under_way and not self._under_way[0][0].open:
            self._under_way.popleft()
        if handle.open:
            self._under_way.append((handle, buffers))

    def __del__(self) -> None:
        self.native = None
        for memory in self._segments:
            memory.close()


# ---- segments ---------------------------------------------------------------------------------------------------


@dataclass
class Segment:
    """A mapping of ``size`` bytes, and the descriptor that says whether its owner lives."""

    name: str
    mapping: mmap.mmap
    descriptor: int

    @property
    def address(self) -> int:
        """Where the mapping starts."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))

    def close(self) -> None:
        """Let go of the memory; views of it must be gone."""
        self.mapping.close()
        os.close(self.descriptor)


def create(size: int) -> Segment:
    """A new segment of zeros, locked by this process. OSError if there is no room for all of it."""
    name = f"flash-comm-{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)  # without it a full /dev/shm is a bus error later
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)  # of the process: a forked child does not hold it
        return Segment(name, mmap.mmap(descriptor, size), descriptor)
    except OSError:
        remove(name)
        os.close(descriptor)
        raise


def attach(name: str, size: int) -> Segment:
    """Another process's segment. OSError if it cannot be opened."""
    descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CLOEXEC)
    try:
        return Segment(name, mmap.mmap(descriptor, size), descriptor)
    except OSError:
        os.close(descriptor)
        raise


def remove(name: str) -> None:
    """Take the name away; mappings stay."""
    (FOLDER / name).unlink(missing_ok=True)


def share(size: int, group: dist.ProcessGroup) -> tuple[list[Segment], str]:
    """A segment of ``size`` bytes of each rank of ``group``, in rank order; or none, and why.

    Every rank of ``group`` calls this, and all of them have segments or none has.
    """
    mine, reason, segments = None, "", []
    try:
        mine = create(size)
    except OSError as error:
        reason = f"{FOLDER}: {error.strerror} ({size >> 10} KiB asked for)"
    names = [each.decode() for each in votes.gather(mine.name.encode() if mine else b"", group)]
    reason = votes.failure(reason, group)
    if mine is not None and not reason:
        try:
            for rank, name in enumerate(names):
                segments.append(mine if rank == group.rank() else attach(name, size))
        except OSError as error:
            reason = f"{FOLDER}: {error.strerror}"
        reason = votes.failure(reason, group)  # cast by all: without a first reason every rank has its own segment
    if mine is not None:
        remove(mine.name)
    if not reason:
        return segments, ""
    for each in {id(each): each for each in (*segments, *filter(None, [mine]))}.values():
        each.close()
    return [], reason


def machine() -> str:
    """The same on all processes that can share memory: host name, boot, and this /dev/shm."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        folder = os.stat(FOLDER).st_dev
    except OSError:
        folder = -1
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''} {folder}"
