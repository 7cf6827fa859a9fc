"""Inboxes in pinned host memory, mapped for every GPU: for cards that cannot write each other's memory.

Each rank makes one segment of POSIX shared memory, which only its user can open, for its own inbox; all ranks map it,
and the name is gone before the first message. Bytes cross PCIe twice, once to write and once to read.
"""

from __future__ import annotations

from types import ModuleType

import torch.distributed as dist

from . import shared_memory, votes
from .shared_memory import Segment


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
