"""N ranks in one process: their algorithms run in turns, from exchange to exchange, and payloads are copied over.

What runs between the exchanges is the code that real ranks run, so results are theirs bit for bit. It is how the
accuracy lab simulates eight ranks on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import Tensor

from .link import Link

Start = Callable[[Link], Generator[Any, None, Tensor]]
Boxes = dict[int, tuple[Sequence[Tensor], Sequence[Tensor]]]


def run(start: Start, world: int) -> list[Tensor]:
    """Results, by rank, of the algorithm that ``start(link)`` starts on each of ``world`` ranks."""
    boxes: Boxes = {}
    results: dict[int, Tensor] = {}
    ranks = [start(_link(rank, world, boxes)) for rank in range(world)]
    while len(results) < world:
        for rank, steps in enumerate(ranks):
            try:
                next(steps)
            except StopIteration as end:
                results[rank] = end.value
        _deliver(boxes)
    return [results[rank] for rank in range(world)]


def first(start: Start, world: int) -> Tensor:
    """Rank 0's result; the others are left at their last exchange, which saves their share of the decoding."""
    boxes: Boxes = {}
    ranks = [start(_link(rank, world, boxes)) for rank in range(world)]
    while True:
        for steps in ranks:
            try:
                next(steps)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
        _deliver(boxes)


def _link(rank: int, world: int, boxes: Boxes) -> Link:
    def exchange(sends: Sequence[Tensor], receives: Sequence[Tensor]) -> list[Any]:
        boxes[rank] = sends, receives
        return []

    return Link(rank, world, exchange)


def _deliver(boxes: Boxes) -> None:
    for to, (_, receives) in boxes.items():
        for source, (sends, _) in boxes.items():
            if source != to:
                receives[source].copy_(sends[to])
    boxes.clear()
