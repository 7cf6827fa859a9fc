"""Shared memory between the processes of one user on one machine, found by an unguessable name, soon nameless.

A segment is a file in /dev/shm that only its user can open. Its name is taken away as soon as every process has mapped
it, so nothing stays behind however a process ends. Its owner holds a lock on it for as long as it lives.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from . import votes

FOLDER = Path("/dev/shm")


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


def share(size: int, group: dist.ProcessGroup, near: Collection[int]) -> tuple[dict[int, Segment], str]:
    """The segments, of ``size`` bytes each, of the ranks ``near`` this one and itself; or none, and why.

    Every rank of ``group`` calls this, and all of them have segments or none has.
    """
    mine, reason = None, ""
    try:
        mine = create(size)
    except OSError as error:
        reason = f"{FOLDER}: {error.strerror} ({size >> 10} KiB asked for)"
    names = [each.decode() for each in votes.gather(mine.name.encode() if mine else b"", group)]
    reason = votes.failure(reason, group)
    segments = {} if mine is None else {group.rank(): mine}
    if mine is not None and not reason:
        try:
            for rank in {*near} - {group.rank()}:
                segments[rank] = attach(names[rank], size)
        except OSError as error:
            reason = f"{FOLDER}: {error.strerror}"
        reason = votes.failure(reason, group)  # cast by all: without a first reason every rank has its own segment
    if mine is not None:
        remove(mine.name)
    if not reason:
        return segments, ""
    for each in segments.values():
        each.close()
    return {}, reason


def machine() -> str:
    """The same on all processes that can share memory: host name, boot, and this /dev/shm."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        folder = os.stat(FOLDER).st_dev
    except OSError:
        folder = -1
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''} {folder}"
