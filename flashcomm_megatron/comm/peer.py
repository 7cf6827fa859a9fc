"""Inboxes in GPU memory that other GPUs of the machine write directly: CUDA IPC over NVLink or PCIe.

Each rank allocates its inbox itself, since torch's caching allocator hands out parts of segments that cannot be
shared, and hands its IPC handle to the others over the process group. Ranks may also share one GPU.
"""

from __future__ import annotations

from types import ModuleType

import torch.distributed as dist

from . import votes


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
