"""How the ranks of a group are joined, as far as plans and thresholds depend on it; transport/links.py finds out."""

from __future__ import annotations

from typing import NamedTuple

STREAMED = ("auto", "host")  # the transports that use streams of our own for tensors in main memory


class Wire(NamedTuple):
    """What joins them, and where they are."""

    kind: str  # "shared memory" or "connections" of our own; else the tensors' device: the process group
    nodes: tuple[int, ...] = ()  # the machine of each rank; empty: one machine
