"""Ranks that wait for each other in different calls are told so within seconds, on every transport.

Where one rank compresses what another one defers, the first waits for messages and the second inside
torch.distributed, which knows nothing of ours. So a communicator keeps its last calls, compressed and deferred. One
thread of the process looks at every communicator now and then. Where no call was made since it looked last, it writes
the calls into the process group's store and compares them with what the other ranks wrote: two different calls of one
number never meet. It says so, and ends the waiting of this rank; the others lose their connections. It does the same
where another rank alone had an error of a strict configuration (observe/messages.py) and did not make the call.

A call costs one entry in a list. A group that stands still costs a few messages to the store.
"""

from __future__ import annotations

import atexit
import json
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch.distributed as dist

from ..observe import messages

if TYPE_CHECKING:
    from .communicator import Communicator

PATIENCE = 5.0  # seconds from one look to the next
LOOKS = 3  # at what the other ranks wrote, since the last call
KEPT = 64  # calls of a group
FAILED = "failed"  # beside the numbers of calls
DIFFERENCE = (
    "the ranks of this group wait for each other in different calls: {}. Every rank must make the same calls, "
    "in the same order, with the same lengths and configuration."
)

_watched: WeakSet[Communicator] = WeakSet()
_lock = threading.Lock()
_end = threading.Event()
_thread: threading.Thread | None = None


class Calls:
    """The last calls of one rank over one group, and how often it was looked at them since the last one."""

    def __init__(self) -> None:
        self.count = 0
        self.seen, self.looks = 0, 0
        self._last: deque[str] = deque(maxlen=KEPT)

    def note(self, call: str) -> None:
        """Add a call: words that must be the same on every rank."""
        self._last.append(call)
        self.count += 1

    def by_number(self) -> dict[str, str]:
        """Each by its number."""
        last = self._last.copy()
        return {str(self.count - len(last) + 1 + place): call for place, call in enumerate(last)}


def watch(comm: Communicator) -> None:
    """Look at ``comm`` from now on, for as long as it lives. On every rank, before its first call."""
    _store(comm).set(_key(comm.rank), "{}")  # an earlier group of this name may have left its calls
    global _thread
    with _lock:
        _watched.add(comm)
        if _thread is None or not _thread.is_alive():  # dead: in a forked child
            _thread = threading.Thread(target=_run, name="flash-comm stalls", daemon=True)
            _thread.start()
            atexit.unregister(_stop)
            atexit.register(_stop)


def look(comm: Communicator) -> None:
    """Compare the calls of ``comm`` with those of the other ranks, if it has stood still."""
    calls = comm.calls
    if calls.count != calls.seen:
        calls.seen, calls.looks = calls.count, 0
    elif calls.count and calls.looks < LOOKS and not comm.has_failed:
        calls.looks += 1
        mine, store = calls.by_number(), _store(comm)
        store.set(_key(comm.rank), json.dumps(mine | {FAILED: messages.raised()}))
        for rank in range(comm.world):
            has_written = rank != comm.rank and store.check([_key(rank)])  # get() would wait for who never does
            theirs = json.loads(store.get(_key(rank))) if has_written else mine
            number = next((each for each in mine if theirs.get(each, mine[each]) != mine[each]), None)
            if number is not None:
                made = sorted([(comm.ranks[comm.rank], mine[number]), (comm.ranks[rank], theirs[number])])
                reason = DIFFERENCE.format(" while ".join(f"rank {each} made {call}" for each, call in made))
            elif calls.looks == LOOKS and has_given_up(theirs, calls.count):
                reason = f"rank {comm.ranks[rank]} has given up before this call: {theirs[FAILED]}"
            else:
                continue
            comm.stop(reason)
            calls.looks = LOOKS
            return


def has_given_up(theirs: dict[str, str], count: int) -> bool:
    """Whether a rank that wrote ``theirs`` raised a strict error in place of call ``count``, which it does not know.

    Asked at the last look, so that a rank that stands still as well has written since: it knows the call before.
    """
    knows_before = count == 1 or str(count - 1) in theirs
    return bool(theirs.get(FAILED)) and not messages.raised() and knows_before and str(count) not in theirs


def _run() -> None:
    while not _end.wait(PATIENCE):
        with _lock:
            found = list(_watched)
        while found:  # no name stays on a communicator while the thread sleeps: it would never be freed
            with suppress(Exception):  # the group is gone, or the process that keeps its store
                look(found.pop())


def _stop() -> None:
    """At the end of the process: no thread may be inside torch then."""
    _end.set()
    if _thread is not None:
        _thread.join(1.0)


def _store(comm: Communicator) -> Any:
    return dist.distributed_c10d._get_process_group_store(comm.group)


def _key(rank: int) -> str:
    return f"flash-comm calls of {rank}"
