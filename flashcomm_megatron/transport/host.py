"""Inboxes in pinned host memory, mapped for every GPU: for cards that cannot write each other's memory.

Each rank makes one segment of POSIX shared memory, which only its user can open, for its own inbox; all ranks map it,
and the name is gone before the first message. Bytes cross PCIe twice, once to write and once to read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from pathlib import Path
from types import ModuleType

import torch.distributed as dist

from . import votes

FOLDER = Path("/dev/shm")


def create(size: int) -> tuple[str, mmap.mmap]:
    """Name and mapping of a new segment of zeros. OSError if there is no room for all of it."""
    name = f"flash-comm-{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)  # without it a full /dev/shm is a bus error later
        return name, mmap.mmap(descriptor, size)
    except OSError:
        remove(name)
        raise
    finally:
        os.close(descriptor)


def attach(name: str, size: int) -> mmap.mmap:
    """The mapping of another rank's segment. OSError if it cannot be opened."""
    descriptor = os.open(FOLDER / name, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def remove(name: str) -> None:
    """Take the name away; mappings stay."""
    (FOLDER / name).unlink(missing_ok=True)


def address(mapping: mmap.mmap) -> int:
    """Where a mapping starts."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


class HostInboxes:
    """``addresses``: every rank's inbox of ``size`` bytes as ``device`` addresses it; ``reason``: why that failed."""

    def __init__(self, cuda: ModuleType, device: int, size: int, group: dist.ProcessGroup) -> None:
        self._cuda = cuda
        self._pinned: list[mmap.mmap] = []
        self.addresses: list[int] = []
        reason, name, mine = "", "", None
        try:
            name, mine = create(size)
        except OSError as error:
            reason = f"{FOLDER}: {error.strerror} ({size >> 20} MiB asked for)"
        names = [each.decode() for each in votes.gather(name.encode(), group)]
        self.reason = votes.failure(reason, group)
        if not self.reason:
            self.reason = votes.failure(self._map(names, mine, group.rank(), device, size), group)
        if name:
            remove(name)

    def _map(self, names: list[str], mine: mmap.mmap | None, me: int, device: int, size: int) -> str:
        try:
            for rank, name in enumerate(names):
                mapping = mine if rank == me and mine is not None else attach(name, size)
                self.addresses.append(self._cuda.host_register(device, address(mapping), size))
                self._pinned.append(mapping)
        except (OSError, RuntimeError) as error:
            return str(error)
        return ""

    def unmap(self) -> None:
        """Let go of all inboxes."""
        for mapping in self._pinned:
            self._cuda.host_unregister(address(mapping))
            mapping.close()
        self._pinned, self.addresses = [], []

    def free(self) -> None:
        """Nothing is left to free: the last mapping was the memory."""
