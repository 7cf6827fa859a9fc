"""The streams' protocol as an executable model: every interleaving of a writer, a reader and their naps.

A rank of csrc/cpu/streams.cpp moves what it can (ring.cpp), and when nothing moves it announces sleep, looks once more,
and sleeps on its doorbell unless the doorbell has changed since. After a store to a counter it looks whether it has to
ring the other end's. The model has one ring, one writer and one reader, each a little program of atomic actions (all
are sequentially consistent), and explores every order. It must find that all bytes arrive in order, that no byte is
overwritten before it was read, and that a rank never sleeps for ever while something could move. Naps with an end are
left out: they would hide a lost wake-up. Every rule can be taken away, to see that it is needed.

Counters count to infinity here, or modulo a small number (``modulus``), as they would wrap after 2**64 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

WRITER, READER = 0, 1


class Rules(NamedTuple):
    """The rules as built."""

    look_again: bool = True  # after announcing sleep, before sleeping
    doorbell_first: bool = True  # what the sleeper compares with is read before the last look
    doorbell_first: bool = True  # read before announcing sleep, and compared by the sleeper
    data_first: bool = True  # bytes are written before the counter that shows them
    room: bool = True  # the writer looks how much has been taken
    modulus: int = 0  # counters wrap; 0: they do not


class Rank(NamedTuple):
    """Where a rank is in its program, and what it has seen."""

    at: str = "look"
    seen: int = 0  # the doorbell before it announced sleep
    is_last_look: bool = False  # it announced sleep


class State(NamedTuple):
    """Everything that is shared, and both ranks."""

    ranks: tuple[Rank, Rank]
    written: int
    taken: int
    ring: tuple[int, ...]  # which byte of the message lies in each place; -1: none
    sent: int  # bytes put into the ring; ``written`` follows
    read: int  # bytes read in order
    doorbells: tuple[int, int]
    asleep: tuple[bool, bool]


class Broken(Exception):
    """A rule of the protocol does not hold in some order."""


class Model:
    """``bytes`` to send through a ring of ``capacity`` under ``rules``."""

    def __init__(self, bytes: int, capacity: int, rules: Rules) -> None:
        self.bytes, self.capacity, self.rules = bytes, capacity, rules

    def start(self) -> State:
        """Nothing sent."""
        ring = (-1,) * self.capacity
        return State((Rank(), Rank()), 0, 0, ring, 0, 0, (0, 0), (False, False))

    def steps(self, state: State) -> Iterator[State]:
        """What can happen next: one action of either rank."""
        for who in (WRITER, READER):
            yield from self._step(state, who)

    def _count(self, value: int) -> int:
        return value % self.rules.modulus if self.rules.modulus else value

    def _can_move(self, state: State, who: int) -> bool:
        """What a look at the other's counter says; only the own counter is known without one."""
        held = self._count(state.written - state.taken)
        if who == READER:
            return held > 0
        return state.sent < self.bytes and (held < self.capacity or not self.rules.room)

    def _finished(self, state: State, who: int) -> bool:
        return (state.sent if who == WRITER else state.read) == self.bytes and state.ranks[who].at == "look"

    def _step(self, state: State, who: int) -> Iterator[State]:
        rank = state.ranks[who]
        if self._finished(state, who):
            return
        if rank.at == "look":
            if self._can_move(state, who):
                first = "copy" if self.rules.data_first or who == READER else "count"
                yield self._go(state, who, first)
            else:
                hears = rank.is_last_look is not self.rules.doorbell_first
                yield self._go(state, who, "hear" if hears else "sleep" if rank.is_last_look else "announce")
        elif rank.at == "hear":
            yield self._go(state, who, "sleep" if rank.is_last_look else "announce", seen=state.doorbells[who])
        elif rank.at == "announce":
            there = state._replace(asleep=_with(state.asleep, who, True))
            yield self._go(there, who, "look" if self.rules.look_again else "sleep", is_last_look=True)
        elif rank.at == "sleep":
            if state.doorbells[who] != rank.seen:
                yield self._go(state, who, "wake")
        elif rank.at == "wake":
            yield self._go(state._replace(asleep=_with(state.asleep, who, False)), who, "look", is_last_look=False)
        else:
            yield self._move(state, who, rank.at)

    def _move(self, state: State, who: int, at: str) -> State:
        """Copy one byte, count it, and ring; then announced sleep is taken back, or the next look begins."""
        if at == "copy":
            place = (state.sent if who == WRITER else state.read) % self.capacity
            after = "ring" if who == WRITER and not self.rules.data_first else "count"
            if who == WRITER:
                if state.ring[place] != -1:
                    raise Broken(f"byte {state.ring[place]} is overwritten before it was read")
                ring = _with(state.ring, place, state.sent)
                return self._go(state._replace(ring=ring, sent=state.sent + 1), who, after)
            if state.ring[place] != state.read:
                raise Broken(f"reads {state.ring[place]} where byte {state.read} should be")
            return self._go(state._replace(ring=_with(state.ring, place, -1), read=state.read + 1), who, after)
        if at == "count":
            counted = {"written": self._count(state.written + 1)} if who == WRITER else {}
            counted |= {"taken": self._count(state.taken + 1)} if who == READER else {}
            after = "copy" if who == WRITER and not self.rules.data_first else "ring"
            return self._go(state._replace(**counted), who, after)
        other = 1 - who
        if state.asleep[other]:
            state = state._replace(doorbells=_with(state.doorbells, other, state.doorbells[other] + 1))
        return self._go(state, who, "wake" if state.ranks[who].is_last_look else "look")

    @staticmethod
    def _go(state: State, who: int, at: str, **changes: object) -> State:
        return state._replace(ranks=_with(state.ranks, who, state.ranks[who]._replace(at=at, **changes)))


def _with(items: tuple[Any, ...], place: int, value: object) -> Any:
    return (*items[:place], value, *items[place + 1 :])


def explore(bytes: int, capacity: int, rules: Rules = Rules()) -> tuple[str | None, int]:  # noqa: B008
    """(what is wrong in some order, or None; number of states) over all interleavings."""
    model = Model(bytes, capacity, rules)
    seen, frontier = {model.start()}, [model.start()]
    while frontier:
        state = frontier.pop()
        try:
            following = list(model.steps(state))
        except Broken as broken:
            return str(broken), len(seen)
        if not following and not (state.sent == state.read == bytes):
            asleep = ["writer", "reader"][WRITER if state.ranks[WRITER].at == "sleep" else READER]
            return f"the {asleep} sleeps for ever", len(seen)
        for each in following:
            if each not in seen:
                seen.add(each)
                frontier.append(each)
    return None, len(seen)
