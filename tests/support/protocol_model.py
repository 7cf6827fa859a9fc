"""The rules by which ranks share inboxes, as a program that tries every interleaving of them.

`csrc/cuda/protocol.h` has the same rules under the same names; `csrc/cuda/collectives.h` follows them. A rank's kernel
is a list of steps; the state of the world is one program counter for every block of every rank, because each flag and
each region of an inbox has a single writer. :func:`explore` visits all reachable states and returns the first thing
that goes wrong, or None.

The rules
---------
- A *round* is one pass over the inboxes. Rounds are numbered through all calls by the *epoch*, a word in each rank's
  device memory that the last block of a call advances; a call of k rounds is rounds epoch + 1 ... epoch + k.
- An inbox has one region for every (parity of the round, leg, source rank). Offsets follow from the maximum size.
- ``scatter`` pushes to every rank its own segment, ``share`` pushes the same segment to every rank.
- ``announce(leg)`` stores the round in the flag (leg, source, block) of every rank, also where nothing was pushed.
- ``await(leg)`` waits until the flag of every source has ``reached`` the round.
- ``reduce`` and ``gather`` read the inbox.
- A call starts when the rank's previous call has ended (one stream).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

REDUCE, GATHER = "reduce", "gather"

# What one round of each collective does; csrc/cuda/collectives.h runs the same steps in the same order.
SCRIPTS: dict[str, tuple[tuple[str, str], ...]] = {
    "two-step": (
        ("scatter", REDUCE), ("announce", REDUCE), ("await", REDUCE), ("read", REDUCE),
        ("share", GATHER), ("announce", GATHER), ("await", GATHER), ("read", GATHER),
    ),
    "one-step": (("share", REDUCE), ("announce", REDUCE), ("await", REDUCE), ("read", REDUCE)),
    "reduce_scatter": (("scatter", REDUCE), ("announce", REDUCE), ("await", REDUCE), ("read", REDUCE)),
    "all_gather": (("share", GATHER), ("announce", GATHER), ("await", GATHER), ("read", GATHER)),
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """The rules as built. Every field is a rule that can be taken away to see that it is needed."""

    parities: int = 2  # 1: no second buffer
    compare: str = "reached"  # "equal": flag == round
    announce_empty: bool = True  # False: no flag where nothing was pushed, and nobody waits for it
    modulus: int = 2**64  # flags are unsigned words
    stream_order: bool = True  # False: calls on two streams at once

    def parity(self, round: int) -> int:
        """Which of the two buffers a round uses."""
        return round % self.parities

    def passes(self, seen: int, wanted: int) -> bool:
        """Whether a flag holding ``seen`` lets a rank go on that waits for round ``wanted``."""
        return seen == wanted if self.compare == "equal" else reached(seen, wanted, self.modulus)


AS_BUILT = Rules()


def reached(seen: int, wanted: int, modulus: int) -> bool:
    """``seen`` is ``wanted`` or at most half a turn ahead of it: an order that survives the wrap of the word."""
    return (seen - wanted) % modulus < modulus // 2


class Call(NamedTuple):
    """One collective: its kind, rounds, blocks per rank, and the ranks whose segment of it is empty."""

    kind: str
    rounds: int = 1
    blocks: int = 1
    empty: frozenset[int] = frozenset()


class Step(NamedTuple):
    """One indivisible action of one block. ``peer`` is None for steps that concern all ranks at once."""

    action: str
    leg: str
    round: int
    call: int
    peer: int | None = None


Thread = tuple[int, int]  # rank, block
Order = Sequence[int]


def steps_of(rank: int, block: int, calls: Sequence[Call], world: int, first: int, order: Order) -> Iterator[Step]:
    """The program of one block. ``order``: how a block takes its peers; ``first``: the first round."""
    round = first
    for index, call in enumerate(calls):
        for _ in range(call.rounds):
            if block < call.blocks:
                for action, leg in SCRIPTS[call.kind]:
                    peers = (
                        [(rank + k) % world for k in order] if action in ("scatter", "share", "announce") else [None]
                    )
                    yield from (Step(action, leg, round, index, peer) for peer in peers)
            round += 1


def pushes(call: Call, action: str, source: int, destination: int) -> bool:
    """Whether ``source`` has something to push to ``destination``: a segment belongs to its owner."""
    return (destination if action == "scatter" else source) not in call.empty


def receives(call: Call, leg: str, source: int, destination: int) -> bool:
    """Whether ``destination`` reads something of ``source`` in this leg."""
    sharing = ("share", leg) in SCRIPTS[call.kind]
    return pushes(call, "share" if sharing else "scatter", source, destination)


class World:
    """All blocks of all ranks, and what each step needs of the others, worked out before the search."""

    def __init__(self, world: int, calls: Sequence[Call], rules: Rules, first: int, order: Order) -> None:
        blocks = max(call.blocks for call in calls)
        self.calls, self.rules, self.world, self.before = calls, rules, world, first - 1
        self.threads: list[Thread] = [(rank, block) for rank in range(world) for block in range(blocks)]
        self.position = {thread: i for i, thread in enumerate(self.threads)}
        self.programs = [list(steps_of(*thread, calls, world, first, order)) for thread in self.threads]
        self.announced = [self._announcements(i) for i in range(len(self.threads))]
        self.needs = [[self._needs(i, pc) for pc in range(len(self.programs[i]))] for i in range(len(self.threads))]

    def _announcements(self, i: int) -> list[dict[tuple[int, str], int]]:
        """For every program counter of block i: the last round it stored in (peer, leg)."""
        now: dict[tuple[int, str], int] = {}
        history = [now]
        for step in self.programs[i]:
            if step.action == "announce" and self._has_flag(i, step):
                now = {**now, (step.peer or 0, step.leg): step.round}
            history.append(now)
        return history

    def _has_flag(self, i: int, step: Step) -> bool:
        assert step.peer is not None
        return self.rules.announce_empty or receives(self.calls[step.call], step.leg, self.threads[i][0], step.peer)

    def _needs(self, i: int, pc: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(to start, to be right) of a step, both as [(block, program counter it must have passed)]."""
        step, rank = self.programs[i][pc], self.threads[i][0]
        start = []
        if self.rules.stream_order and (pc == 0 or self.programs[i][pc - 1].call != step.call):
            mates = [j for j, thread in enumerate(self.threads) if thread[0] == rank]
            start = [(j, sum(s.call < step.call for s in self.programs[j])) for j in mates]
        return start, list(self._readers(i, step)) if step.action in ("scatter", "share") else []

    def _readers(self, i: int, step: Step) -> Iterator[tuple[int, int]]:
        """Blocks that must have read what this push overwrites. Slots differ only between blocks of one call."""
        rank, block = self.threads[i]
        assert step.peer is not None
        for j, (reader, reader_block) in enumerate(self.threads):
            for pc, read in enumerate(self.programs[j]):
                same_region = (reader, read.leg) == (step.peer, step.leg) and self.rules.parity(
                    read.round
                ) == self.rules.parity(step.round)
                if read.action != "read" or not same_region or read.round >= step.round:
                    continue
                if receives(self.calls[read.call], read.leg, rank, reader) and (
                    read.call != step.call or reader_block == block
                ):
                    yield j, pc + 1

    def ready(self, state: tuple[int, ...], i: int) -> bool:
        """Whether the next step of block i can be taken."""
        pc = state[i]
        if pc == len(self.programs[i]) or any(state[j] < needed for j, needed in self.needs[i][pc][0]):
            return False
        step, (rank, block) = self.programs[i][pc], self.threads[i]
        return step.action != "await" or all(
            self._flag_passes(state, source, rank, block, step) for source in range(self.world)
        )

    def _flag_passes(self, state: tuple[int, ...], source: int, rank: int, block: int, step: Step) -> bool:
        if not self.rules.announce_empty and not receives(self.calls[step.call], step.leg, source, rank):
            return True
        writer = self.position[source, block]
        seen = self.announced[writer][state[writer]].get((rank, step.leg), self.before)
        return self.rules.passes(seen % self.rules.modulus, step.round % self.rules.modulus)

    def violation(self, state: tuple[int, ...], i: int) -> str | None:
        """What taking the next step of block i would break."""
        step, rank = self.programs[i][state[i]], self.threads[i][0]
        for j, needed in self.needs[i][state[i]][1]:
            if state[j] < needed and pushes(self.calls[step.call], step.action, rank, step.peer or 0):
                return f"rank {rank} round {step.round}: overwrites what rank {self.threads[j][0]} has not read"
        if step.action == "read":
            return self._misread(state, i, step)
        return None

    def _misread(self, state: tuple[int, ...], i: int, step: Step) -> str | None:
        """A source whose push of this round has not arrived."""
        rank, block = self.threads[i]
        for source in range(self.world):
            writer = self.position[source, block]
            for pc, push in enumerate(self.programs[writer]):
                mine = push.action in ("scatter", "share") and (push.peer, push.leg) == (rank, step.leg)
                awaited = mine and push.round == step.round and receives(self.calls[step.call], step.leg, source, rank)
                if awaited and state[writer] <= pc:
                    return f"rank {rank} round {step.round}: reads what rank {source} has not pushed"
        return None


def explore(
    world: int, calls: Sequence[Call], rules: Rules = AS_BUILT, first: int = 1, order: Order | None = None
) -> tuple[str | None, int]:
    """(first violation or deadlock found, or None; number of states) over all interleavings of ``calls``.

    ``first`` is the number of the first round; all flags hold the one before, as after many earlier calls.
    """
    model = World(world, calls, rules, first, order or range(world))
    start = (0,) * len(model.threads)
    end = tuple(map(len, model.programs))
    seen, frontier = {start}, [start]
    while frontier:
        state = frontier.pop()
        ready = [i for i in range(len(state)) if model.ready(state, i)]
        if not ready and state != end:
            return f"deadlock: {_waiting(model, state)}", len(seen)
        for i in ready:
            wrong = model.violation(state, i)
            if wrong:
                return wrong, len(seen)
            following = (*state[:i], state[i] + 1, *state[i + 1 :])
            if following not in seen:
                seen.add(following)
                frontier.append(following)
    return None, len(seen)


def _waiting(model: World, state: tuple[int, ...]) -> str:
    stuck = [i for i, pc in enumerate(state) if pc < len(model.programs[i])]
    return ", ".join(
        f"rank {model.threads[i][0]} at {' '.join(map(str, model.programs[i][state[i]][:3]))}" for i in stuck
    )


def sequences(calls: Iterable[Call], length: int) -> Iterator[tuple[Call, ...]]:
    """All sequences of ``length`` calls."""
    if length == 0:
        yield ()
        return
    calls = list(calls)
    for rest in sequences(calls, length - 1):
        yield from ((*rest, call) for call in calls)
