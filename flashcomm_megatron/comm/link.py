"""What an algorithm knows of its peers: which rank it is, how many there are, where they are, and how to exchange."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Call(NamedTuple):
    """One collective as every rank must know it; as text, "#12/4f2a all_reduce [8, 64] float32 row".

    Messages carry it, so that ranks in different calls, or with different configurations, hear of it.
    """

    number: int  # of the group's calls, from 1
    text: str  # kind, shape, dtype and site
    configuration: str  # its digest

    @property
    def check(self) -> int:
        """16 bits that differ, as good as surely, where the text or the configuration does."""
        return zlib.crc32(f"{self.configuration} {self.text}".encode()) & 0xFFFF

    def __str__(self) -> str:
        return f"#{self.number}/{self.check:04x} {self.text}"


class Transfer(Protocol):
    """A message under way, or several."""

    def wait(self) -> Any:
        """Return when everything has been delivered (on a GPU: make the current stream wait for it)."""


Exchange = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Transfer]]


class Link(NamedTuple):
    """One rank's end of a group. ``exchange(sends, receives)`` sends ``sends[r]`` to and fills ``receives[r]`` from
    every other rank r once all transfers it returns were waited for."""

    rank: int
    world: int
    exchange: Exchange
