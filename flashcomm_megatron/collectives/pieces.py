"""Overlap: a large tensor is cut into pieces, whose encoding, sending and decoding then run at the same time.

Every piece runs the whole algorithm. All of them are started first, so that the wire is busy from the first piece's
encoding to the last one's decoding; then each goes on in turn, as its messages arrive. Pieces end where blocks do, and
every rank cuts in the same places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress

from ..comm.link import Transfer

Going = Generator[Sequence[Transfer], None, None]


def together(pieces: Iterable[Going]) -> Generator[Sequence[Transfer], None, None]:
    """Run generators that each yield the transfers they wait for, all at once."""
    under_way = deque((piece, next(piece)) for piece in pieces)
    while under_way:
        piece, transfers = under_way.popleft()
        yield transfers
        with suppress(StopIteration):
            under_way.append((piece, next(piece)))


def cuts(numel: int, piece: int) -> list[tuple[int, int]]:
    """(first, behind the last) of every piece of ``numel`` values; one piece of all where ``piece`` is 0."""
    step = piece or max(numel, 1)
    return [(first, min(first + step, numel)) for first in range(0, max(numel, 1), step)]
