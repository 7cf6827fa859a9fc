"""The memory that all ranks of a group write: one inbox a rank, for the fused kernels (fused.py).

**Peer**: in GPU memory that other GPUs of the machine write directly, by CUDA IPC over NVLink or PCIe. Each rank
allocates its inbox itself, since torch's caching allocator hands out parts of segments that cannot be shared, and hands
its IPC handle to the others over the process group. Ranks may also share one GPU.

**Host**: in pinned host memory, mapped for every GPU, for cards that cannot write each other's memory. Each rank makes
one segment of POSIX shared memory, which only its user can open; all ranks map it, and the name is gone before the
first message. Bytes cross PCIe twice, once to write and once to read.
"""

from __future__ import annotations

from types import ModuleType

import torch.distributed as dist

from . import shared_memory, votes
from .shared_memory import Segment


class PeerInboxes:
    """``addresses``: every rank's inbox of ``size`` bytes as ``device`` addresses it; ``reason``: why that failed."""

    def __init__(self, cuda: ModuleType, device: int, size: int, group: dist.ProcessGroup) -> None:
        self._cuda, self._device, self._rank = cuda, device, group.rank()
        self._mine = 0
        self.addresses: list[int] = []
        reason, handle = "", b""
        try:
            self._mine = cuda.device_allocate(device, size)
            handle = cuda.ipc_handle(device, self._mine)
        except RuntimeError as error:
            reason = str(error)
        handles = votes.gather(handle, group)
        self.reason = votes.failure(reason, group) or votes.failure(self._open(handles), group)

    def _open(self, handles: list[bytes]) -> str:
        try:
            for rank, handle in enumerate(handles):
                mine = rank == self._rank
                self.addresses.append(self._mine if mine else self._cuda.ipc_open(self._device, handle))
        except RuntimeError as error:
            return str(error)
        return ""

    def unmap(self) -> None:
        """Let go of the other ranks' inboxes."""
        for rank, address in enumerate(self.addresses):
            if rank != self._rank:
                self._cuda.ipc_close(self._device, address)
        self.addresses = []

    def free(self) -> None:
        """Free this rank's inbox; every rank must have called unmap()."""
        if self._mine:
            self._cuda.device_free(self._device, self._mine)
        self._mine = 0


class HostInboxes:
    """``addresses``: every rank's inbox of ``size`` bytes as ``device`` addresses it; ``reason``: why that failed."""

    def __init__(self, cuda: ModuleType, device: int, size: int, group: dist.ProcessGroup) -> None:
        self._cuda = cuda
        self._pinned: list[Segment] = []
        self.addresses: list[int] = []
        segments, self.reason = shared_memory.share(size, group)
        if not self.reason:
            self.reason = votes.failure(self._pin(segments, device, size), group)

    def _pin(self, segments: list[Segment], device: int, size: int) -> str:
        try:
            for each in segments:
                self.addresses.append(self._cuda.host_register(device, each.address, size))
                self._pinned.append(each)
        except RuntimeError as error:
            for each in segments[len(self._pinned) :]:
                each.close()
            return str(error)
        return ""

    def unmap(self) -> None:
        """Let go of all inboxes."""
        for mapped in self._pinned:
            self._cuda.host_unregister(mapped.address)
            mapped.close()
        self._pinned, self.addresses = [], []

    def free(self) -> None:
        """Nothing is left to free: the last mapping was the memory."""
