"""The rules by which ranks share inboxes, as a program that tries every interleaving of them.

`csrc/cuda/protocol.h` has the same rules under the same names; `csrc/cuda/collectives.h` follows them. A rank's kernel
is a list of steps; the state of the world is one program counter for every block of every rank, because each flag and
each region of an inbox has a single writer. :func:`explore` visits all reachable states and returns the first thing
that goes wrong, or None.

The rules
---------
- A *round* is one pass over the inboxes: one *exchange* for every leg. Exchanges are numbered through all calls by the
  *epoch*, a word in each rank's device memory that the last block of a call advances; a call of k exchanges is
  exchanges epoch + 1 ... epoch + k.
- An inbox has a ring of four regions for every source rank; exchange n uses region n % 4, whatever its leg. Offsets
  follow from the maximum size.
- ``scatter`` pushes to every rank its own segment, ``share`` pushes the same segment to every rank.
- ``announce`` stores the exchange in the flag (source, block) of every rank, also where nothing was pushed.
- ``await`` waits until the flag of one source has ``reached`` the exchange: just before its payload is first read.
- ``read`` is the last read of the inbox: of all sources, once every one of them was awaited.
- A block works ahead: the first leg of the next round is pushed before the last leg of this one is awaited.
- A call starts when the rank's previous call has ended (one stream).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

REDUCE, GATHER = "reduce", "gather"

# The legs of one round of each collective: how it pushes, and what it fills.
LEGS: dict[str, tuple[tuple[str, str], ...]] = {
    "two-step": (("scatter", REDUCE), ("share", GATHER)),
    "one-step": (("share", REDUCE),),
    "reduce_scatter": (("scatter", REDUCE),),
    "all_gather": (("share", GATHER),),
}


@dataclass(frozen=True)
class Rules:
    """The rules as built. Every field is a rule that can be taken away to see that it is needed."""

    regions: int = 4  # of the ring; fewer: what lies in a region is pushed over sooner
    halves: bool = False  # True: no ring, but two regions for each leg, taken in turns by the rounds
    ahead: bool = True  # False: a round is pushed when the one before has been read
    compare: str = "reached"  # "equal": flag == exchange
    announce_empty: bool = True  # False: no flag where nothing was pushed, and nobody waits for it
    modulus: int = 2**64  # flags are unsigned words
    stream_order: bool = True  # False: calls on two streams at once

    def region(self, exchange: int) -> int:
        """Which region of the ring an exchange uses."""
        return exchange % self.regions

    def place(self, step: Step) -> tuple[str, int]:
        """What of an inbox a step writes or reads."""
        return (step.leg, step.round % 2) if self.halves else ("", self.region(step.exchange))

    def passes(self, seen: int, wanted: int) -> bool:
        """Whether a flag holding ``seen`` lets a rank go on that waits for exchange ``wanted``."""
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
    """One indivisible action of one block. ``peer``: a destination or a source; None: all of them."""

    action: str
    leg: str
    round: int
    exchange: int
    call: int
    peer: int | None = None


Thread = tuple[int, int]  # rank, block
Order = Sequence[int]


class Block:
    """What one block does: its steps in the order of csrc/cuda/collectives.h."""

    def __init__(self, rank: int, block: int, world: int, order: Order, ahead: bool) -> None:
        self.rank, self.block, self.world, self.order, self.ahead = rank, block, world, order, ahead

    def steps(self, calls: Sequence[Call], first: int) -> Iterator[Step]:
        """The program. ``first``: the first exchange."""
        round, exchange = first, first
        for index, call in enumerate(calls):
            if self.block < call.blocks:
                yield from self._call(index, call, round, exchange)
            round, exchange = round + call.rounds, exchange + call.rounds * len(LEGS[call.kind])

    def _call(self, index: int, call: Call, round: int, exchange: int) -> Iterator[Step]:
        legs = LEGS[call.kind]

        def push(turn: int, leg: int) -> Iterator[Step]:
            peers = [(self.rank + k) % self.world for k in self.order]
            where = legs[leg][1], round + turn, exchange + turn * len(legs) + leg, index
            for action in (legs[leg][0], "announce"):
                yield from (Step(action, *where, peer) for peer in peers)

        def read(turn: int, leg: int) -> Iterator[Step]:
            gathers = legs[leg][1] == GATHER
            sources = [(self.rank - k) % self.world for k in self.order] if gathers else list(range(self.world))
            where = legs[leg][1], round + turn, exchange + turn * len(legs) + leg, index
            yield from (Step("await", *where, source) for source in sources)
            yield Step("read", *where)

        last = len(legs) - 1
        for turn in range(call.rounds):
            if turn == 0 or not self.ahead:
                yield from push(turn, 0)
            if last:
                yield from (*read(turn, 0), *push(turn, 1))
            if self.ahead and turn + 1 < call.rounds:
                yield from push(turn + 1, 0)
            yield from read(turn, last)


def pushes(call: Call, action: str, source: int, destination: int) -> bool:
    """Whether ``source`` has something to push to ``destination``: a segment belongs to its owner."""
    return (destination if action == "scatter" else source) not in call.empty


def receives(call: Call, leg: str, source: int, destination: int) -> bool:
    """Whether ``destination`` reads something of ``source`` in this leg."""
    sharing = ("share", leg) in LEGS[call.kind]
    return pushes(call, "share" if sharing else "scatter", source, destination)


class World:
    """All blocks of all ranks, and what each step needs of the others, worked out before the search."""

    def __init__(self, world: int, calls: Sequence[Call], rules: Rules, first: int, order: Order) -> None:
        blocks = max(call.blocks for call in calls)
        self.calls, self.rules, self.world, self.before = calls, rules, world, first - 1
        self.threads: list[Thread] = [(rank, block) for rank in range(world) for block in range(blocks)]
        self.position = {thread: i for i, thread in enumerate(self.threads)}
        self.programs = [list(Block(*thread, world, order, rules.ahead).steps(calls, first)) for thread in self.threads]
        self.announced = [self._announcements(i) for i in range(len(self.threads))]
        self.needs = [[self._needs(i, pc) for pc in range(len(self.programs[i]))] for i in range(len(self.threads))]

    def _announcements(self, i: int) -> list[dict[int, int]]:
        """For every program counter of block i: the last exchange it stored at each peer."""
        now: dict[int, int] = {}
        history = [now]
        for step in self.programs[i]:
            if step.action == "announce" and self._has_flag(i, step):
                now = {**now, step.peer or 0: step.exchange}
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
                same_region = reader == step.peer and self.rules.place(read) == self.rules.place(step)
                if read.action != "read" or not same_region or read.exchange >= step.exchange:
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
        return step.action != "await" or self._flag_passes(state, step.peer or 0, rank, block, step)

    def _flag_passes(self, state: tuple[int, ...], source: int, rank: int, block: int, step: Step) -> bool:
        if not self.rules.announce_empty and not receives(self.calls[step.call], step.leg, source, rank):
            return True
        writer = self.position[source, block]
        seen = self.announced[writer][state[writer]].get(rank, self.before)
        return self.rules.passes(seen % self.rules.modulus, step.exchange % self.rules.modulus)

    def is_alone(self, state: tuple[int, ...], i: int) -> bool:
        """Whether it suffices to take the next step of block i first: nothing that others do comes out differently.

        A flag that passes goes on to pass, and a flag that is stored early lets others do no more than they may do
        anyway. Pushes and reads are what must be tried in every order.
        """
        lasting = self.rules.compare == "reached" and self.rules.modulus == 2**64
        return lasting and self.programs[i][state[i]].action in ("await", "announce")

    def violation(self, state: tuple[int, ...], i: int) -> str | None:
        """What taking the next step of block i would break."""
        step, rank = self.programs[i][state[i]], self.threads[i][0]
        for j, needed in self.needs[i][state[i]][1]:
            if state[j] < needed and pushes(self.calls[step.call], step.action, rank, step.peer or 0):
                return f"rank {rank} exchange {step.exchange}: overwrites what rank {self.threads[j][0]} has not read"
        if step.action == "await":
            return self._misread(state, i, step)
        return None

    def _misread(self, state: tuple[int, ...], i: int, step: Step) -> str | None:
        """The source that was awaited, if its push of this exchange has not arrived: it is read next."""
        (rank, block), source = self.threads[i], step.peer or 0
        if not receives(self.calls[step.call], step.leg, source, rank):
            return None
        writer = self.position[source, block]
        for pc, push in enumerate(self.programs[writer]):
            mine = push.action in ("scatter", "share") and (push.peer, push.exchange) == (rank, step.exchange)
            if mine and state[writer] <= pc:
                return f"rank {rank} exchange {step.exchange}: reads what rank {source} has not pushed"
        return None


def explore(
    world: int, calls: Sequence[Call], rules: Rules = AS_BUILT, first: int = 1, order: Order | None = None
) -> tuple[str | None, int]:
    """(first violation or deadlock found, or None; number of states) over all interleavings of ``calls`` that differ.

    ``first`` is the number of the first exchange; all flags hold the one before, as after many earlier calls.
    """
    model = World(world, calls, rules, first, order or range(world))
    start = (0,) * len(model.threads)
    end = tuple(map(len, model.programs))
    seen, frontier = {start}, [start]
    while frontier:
        state = frontier.pop()
        ready = [i for i in range(len(state)) if model.ready(state, i)]
        ready = next(([i] for i in ready if model.is_alone(state, i)), ready)
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
        f"rank {model.threads[i][0]} at {' '.join(map(str, model.programs[i][state[i]][:4]))}" for i in stuck
    )


def sequences(calls: Iterable[Call], length: int) -> Iterator[tuple[Call, ...]]:
    """All sequences of ``length`` calls."""
    if length == 0:
        yield ()
        return
    calls = list(calls)
    for rest in sequences(calls, length - 1):
        yield from ((*rest, call) for call in calls)
