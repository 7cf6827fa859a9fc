"""Global memory with bounds and alignment, and shared memory with its bank conflicts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BASE = 0x7F0000000000  # of global memory
GAP = 256  # bytes between tensors that belong to nobody


class BadAccessError(Exception):
    """An access out of bounds or not aligned to its size."""


def gather(words: Array, offsets: Array, size: int) -> Array:
    """[lanes, words of 32 bits] from byte ``offsets``; sizes below 4 fill a part of one word."""
    if size >= 4:
        return words[offsets[:, None] // 4 + np.arange(size // 4)]
    small = words.view({1: np.uint8, 2: np.uint16}[size])
    return small[offsets // size].astype(np.uint32)[:, None]


def scatter(words: Array, offsets: Array, size: int, values: Array) -> None:
    """The inverse; of lanes that write the same place the last one wins."""
    if size >= 4:
        words[offsets[:, None] // 4 + np.arange(size // 4)] = values
    else:
        small = words.view({1: np.uint8, 2: np.uint16}[size])
        small[offsets // size] = values[:, 0].astype(small.dtype)


class GlobalMemory:
    """Tensors at addresses of their own. What lies between them is nobody's."""

    def __init__(self, size: int = 1 << 24) -> None:
        self.words = np.zeros(size // 4, np.uint32)
        self.bytes = self.words.view(np.uint8)
        self.valid = np.zeros(size, bool)
        self.used = GAP
        self.widths: Counter[tuple[str, int]] = Counter()  # ("load" | "store", bytes) -> lanes that did so

    def place(self, data: Array, shift: int = 0) -> int:
        """Copies ``data`` to a new address, 256 bytes aligned but for ``shift``; returns the address."""
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        start = (self.used + GAP - 1) // GAP * GAP + shift
        self.used = start + raw.nbytes + GAP
        assert self.used <= self.valid.size, "global memory is full: make it larger"
        self.bytes[start : start + raw.nbytes] = raw
        self.valid[start : start + raw.nbytes] = True
        return BASE + start

    def read(self, address: int, size: int) -> Array:
        """The bytes that lie there now."""
        return self.bytes[address - BASE : address - BASE + size].copy()

    def write(self, address: int, data: Array) -> None:
        """Overwrites bytes."""
        self.bytes[address - BASE : address - BASE + data.nbytes] = data.view(np.uint8).reshape(-1)

    def _offsets(self, addresses: Array, size: int) -> Array:
        offsets = addresses.astype(np.int64) - BASE
        inside = (offsets >= 0) & (offsets + size <= self.valid.size)
        if not inside.all():
            raise BadAccessError(f"0x{addresses[~inside][0]:x} is no address of global memory")
        owned = self.valid[offsets] & self.valid[offsets + size - 1]
        if not owned.all():
            raise BadAccessError(f"{size} bytes at 0x{addresses[~owned][0]:x} are out of bounds")
        if (offsets % size).any():
            raise BadAccessError(f"0x{addresses[offsets % size != 0][0]:x} is not aligned to {size} bytes")
        return offsets

    def load(self, addresses: Array, size: int) -> Array:
        """[lanes, words]"""
        self.widths["load", size] += len(addresses)
        return gather(self.words, self._offsets(addresses, size), size)

    def store(self, addresses: Array, size: int, values: Array) -> None:
        """``values``: [lanes, words]"""
        self.widths["store", size] += len(addresses)
        scatter(self.words, self._offsets(addresses, size), size, values)


class SharedMemory:
    """Every block's shared memory: ``size`` bytes from ``base`` on."""

    def __init__(self, blocks: int, base: int, size: int) -> None:
        self.base, self.size, self.stride = base, size, (base + size + 15) // 16 * 16
        self.words = np.zeros(blocks * self.stride // 4, np.uint32)
        self.wavefronts = self.ideal = 0
        self.widths: Counter[tuple[str, int]] = Counter()

    def _offsets(self, addresses: Array, blocks: Array, warps: Array, size: int) -> Array:
        within = addresses.astype(np.int64) & 0xFFFFFF
        if ((within < self.base) | (within + size > self.base + self.size)).any():
            raise BadAccessError(f"{size} bytes at 0x{within.max():x} of shared memory are out of bounds")
        if (within % size).any():
            raise BadAccessError(f"0x{within[within % size != 0][0]:x} of shared memory is not aligned to {size} bytes")
        self._count(within, warps, size)
        return within + blocks * self.stride

    def _count(self, within: Array, warps: Array, size: int) -> None:
        """Wavefronts: for each warp the most words that one bank has to serve; ideal: all banks at work."""
        touched = within[:, None] // 4 + np.arange(max(size // 4, 1))
        words = np.unique((warps[:, None].astype(np.int64) << 24) + touched)
        rows = np.bincount((words >> 24) * 32 + words % 32)
        rows = np.append(rows, np.zeros(-len(rows) % 32, rows.dtype)).reshape(-1, 32)
        self.wavefronts += int(rows.max(1).sum())
        self.ideal += int(((np.bincount(warps) * size + 127) // 128).sum())

    def load(self, addresses: Array, blocks: Array, warps: Array, size: int) -> Array:
        """[lanes, words]"""
        self.widths["load", size] += len(addresses)
        return gather(self.words, self._offsets(addresses, blocks, warps, size), size)

    def store(self, addresses: Array, blocks: Array, warps: Array, size: int, values: Array) -> None:
        """``values``: [lanes, words]"""
        self.widths["store", size] += len(addresses)
        scatter(self.words, self._offsets(addresses, blocks, warps, size), size, values)
