"""N ranks in one process: their algorithms run in turns, from wait to wait, and payloads are copied over.

What runs between the waits is the code that real ranks run, so results are theirs bit for bit. It is how the accuracy
lab simulates eight ranks on one core.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .link import Link

Start = Callable[[Link], Generator[Any, None, Tensor]]


class _Exchange:
    """The messages that one rank posted together."""

    def __init__(self) -> None:
        self.open = 0

    def wait(self) -> None:
        """Messages are delivered between the turns."""


class _Post:
    """Messages from rank to rank, in order, that were posted at one end or both."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._sent: dict[tuple[int, int], deque[tuple[Tensor, _Exchange]]] = defaultdict(deque)
        self._awaited: dict[tuple[int, int], deque[tuple[Tensor, _Exchange]]] = defaultdict(deque)

    def link(self, rank: int) -> Link:
        return Link(rank, self._world, partial(self._exchange, rank))

    def _exchange(self, rank: int, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> list[_Exchange]:
        exchange = _Exchange()
        for peer in range(self._world):
            if peer != rank:
                self._add(self._sent[rank, peer], sends[peer], exchange)
                self._add(self._awaited[peer, rank], receives[peer], exchange)
        return [exchange]

    @staticmethod
    def _add(queue: deque[tuple[Tensor, _Exchange]], payload: Tensor, exchange: _Exchange) -> None:
        if payload.numel():
            queue.append((payload, exchange))
            exchange.open += 1

    def deliver(self) -> None:
        for pair, awaited in self._awaited.items():
            sent = self._sent[pair]
            while awaited and sent:
                (box, receiver), (payload, sender) = awaited.popleft(), sent.popleft()
                box.copy_(payload)
                receiver.open -= 1
                sender.open -= 1


def run(start: Start, world: int) -> list[Tensor]:
    """Results, by rank, of the algorithm that ``start(link)`` starts on each of ``world`` ranks."""
    results = _turns(start, world, world)
    return [results[rank] for rank in range(world)]


def first(start: Start, world: int) -> Tensor:
    """The result of whichever rank ends first; the others are left where they are, which saves their decoding."""
    return next(iter(_turns(start, world, 1).values()))


def _turns(start: Start, world: int, wanted: int) -> dict[int, Tensor]:
    """Run all ranks in turns until ``wanted`` of them have ended."""
    post = _Post(world)
    ranks = {rank: start(post.link(rank)) for rank in range(world)}
    waiting: dict[int, Sequence[_Exchange]] = dict.fromkeys(ranks, ())
    results: dict[int, Tensor] = {}
    while len(results) < wanted:
        ready = [rank for rank, transfers in waiting.items() if not any(each.open for each in transfers)]
        if not ready:
            raise RuntimeError(f"ranks {list(waiting)} wait for messages that nobody sends.")
        for rank in ready:
            try:
                waiting[rank] = next(ranks[rank])
            except StopIteration as end:
                results[rank] = end.value
                del waiting[rank]
                if len(results) == wanted:
                    break
        post.deliver()
    return results
