"""How long a test waits for others: seconds of a quiet machine, stretched by how many processes share its cores.

A test that waits ends in time on a quiet machine and does not fail on a busy one. Everything that waits asks here:
``spawn``, scripts that tests start, and pytest's own timeout (tests/conftest.py).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

LONGEST = 6.0  # times the seconds asked for: past that a machine is of no use, or the test hangs


def busyness() -> float:
    """How many processes want each core, by the last minute and by this moment; from 1 to ``LONGEST``."""
    wanting = os.getloadavg()[0]
    now = Path("/proc/loadavg")
    if now.exists():
        wanting = max(wanting, float(now.read_text().split()[3].split("/")[0]))
    return min(max(1.0, wanting / len(os.sched_getaffinity(0))), LONGEST)


def patient(seconds: float) -> float:
    """``seconds`` of a quiet machine on this one, as it is now."""
    return seconds * busyness()


class Deadline:
    """The end of ``seconds`` of a quiet machine. It moves away while the machine is busy, never nearer."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.started, self.allowed = seconds, time.monotonic(), patient(seconds)

    def left(self) -> float:
        """Seconds that are left, at least 0."""
        self.allowed = max(self.allowed, patient(self.seconds))
        return max(0.0, self.started + self.allowed - time.monotonic())
