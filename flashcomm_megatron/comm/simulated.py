"""N ranks in one process: their algorithms run in turns, from wait to wait, and payloads are copied over.

What runs between the waits is the code that real ranks run, so results are theirs bit for bit. It is how the accuracy
lab simulates eight ranks on one core.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from .buffers import Buffers
from .communicator import Call, Gpus
from .progress import Progress


class Posted:
    """The messages that one rank posted together."""

    def __init__(self) -> None:
        self.open = 0

    def wait(self) -> None:
        """Messages are delivered between the turns."""


Queue = deque[tuple[Tensor, Posted]]


class Mailbox:
    """Messages from rank to rank, in order, that were posted at one end or both."""

    def __init__(self) -> None:
        self._sent: dict[tuple[int, int], Queue] = defaultdict(deque)
        self._awaited: dict[tuple[int, int], Queue] = defaultdict(deque)

    def post(self, rank: int, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Posted:
        posted = Posted()
        for peer in range(len(sends)):
            for queue, part in ((self._sent[rank, peer], sends[peer]), (self._awaited[peer, rank], receives[peer])):
                if peer != rank and part.numel():
                    queue.append((part, posted))
                    posted.open += 1
        return posted

    def deliver(self) -> None:
        for pair, awaited in self._awaited.items():
            sent = self._sent[pair]
            while awaited and sent:
                (box, receiver), (payload, sender) = awaited.popleft(), sent.popleft()
                box.copy_(payload)
                receiver.open -= 1
                sender.open -= 1


class Simulated:
    """A communicator of simulated ranks, and its transport; ``nodes``: the machine of each rank, one machine if empty.

    ``kind``: what joins them, as a real communicator's ``transport_name`` says; None: what would on one machine.
    """

    def __init__(
        self, rank: int, world: int, nodes: Sequence[int] = (), kind: str | None = None, mailbox: Mailbox | None = None
    ) -> None:
        self.rank, self.world, self.nodes = rank, world, tuple(nodes) or (0,) * world
        self.gpus = Gpus((0,) * world)
        self.number, self.progress, self.buffers = 0, Progress(), Buffers()
        self._kind, self._mailbox = kind, mailbox

    def transport_name(self, device: torch.device, config: Config) -> str:
        """What joins the ranks for tensors on ``device``."""
        shared = device.type == "cpu" and config.transport != "group"
        return self._kind or ("shared memory" if shared else device.type)

    def transport(self, device: torch.device, config: Config) -> Simulated:
        """What carries messages: itself."""
        return self

    def seconds(self, config: Config) -> float:
        """Nobody waits here."""
        return 0.0

    def exchange(
        self, outbox: Tensor, out_sizes: Sequence[int], inbox: Tensor, in_sizes: Sequence[int], call: Call
    ) -> Posted:
        assert self._mailbox is not None, "made without a mailbox: for plans alone"
        return self._mailbox.post(self.rank, torch.split(outbox, list(out_sizes)), torch.split(inbox, list(in_sizes)))

    def gather(self, inbox: Tensor, own: Tensor, call: Call) -> Posted:
        assert self._mailbox is not None, "made without a mailbox: for plans alone"
        return self._mailbox.post(self.rank, [own] * self.world, torch.split(inbox, own.numel()))


Start = Callable[[Simulated], Generator[Any, None, Tensor]]


def run(start: Start, world: int, nodes: Sequence[int] = ()) -> list[Tensor]:
    """Results, by rank, of the algorithm that ``start(communicator)`` starts on each of ``world`` ranks."""
    results = _turns(start, world, nodes, world)
    return [results[rank] for rank in range(world)]


def first(start: Start, world: int) -> Tensor:
    """The result of whichever rank ends first; the others are left where they are, which saves their decoding."""
    return next(iter(_turns(start, world, (), 1).values()))


def _turns(start: Start, world: int, nodes: Sequence[int], wanted: int) -> dict[int, Tensor]:
    """Run all ranks in turns until ``wanted`` of them have ended."""
    mailbox = Mailbox()
    ranks = {rank: start(Simulated(rank, world, nodes, mailbox=mailbox)) for rank in range(world)}
    waiting: dict[int, Posted | None] = dict.fromkeys(ranks)
    results: dict[int, Tensor] = {}
    while len(results) < wanted:
        ready = [rank for rank, posted in waiting.items() if posted is None or not posted.open]
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
        mailbox.deliver()
    return results
