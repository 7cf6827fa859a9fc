"""A thread that finishes what was started and not waited for, so that both legs of a collective travel meanwhile.

Jobs run one after the other, in the order in which they were handed over, which is the same on every rank. A call that
does not hand over its work first lets the thread finish: so all ranks post their messages in one order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Progress:
    """One thread, started with its first job."""

    def __init__(self) -> None:
        self.open = 0  # jobs that have not ended
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = threading.Condition()

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job``, which raises nothing, behind those handed over before."""
        with self._ended:
            self.open += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flash-comm progress", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def drain(self) -> None:
        """Return when every job has ended."""
        if threading.current_thread() is not self._thread:
            self.wait_for(lambda: not self.open)

    def wait_for(self, holds: Callable[[], bool]) -> None:
        """Return when ``holds()``, which is asked whenever a job has ended."""
        with self._ended:
            self._ended.wait_for(holds)

    def close(self) -> None:
        """End the thread behind its last job."""
        if self._thread is not None:
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job
            with self._ended:
                self.open -= 1
                self._ended.notify_all()
