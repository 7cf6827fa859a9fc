"""What an algorithm knows of its peers: which rank it is, how many there are, where they are, and how to exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


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
