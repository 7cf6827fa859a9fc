"""Counters of what the collectives did on this rank: plain Python integers, so counting never waits for a device.

``exact_bytes`` is what the same collectives would have sent from this rank uncompressed, ``wire_bytes`` what they
sent; a deferred call adds the same number to both, so their quotient is the compression of everything that went
through. ``remote_bytes`` is what quantized calls sent to other machines, 0 where all ranks share one. ``seconds`` is
host time inside the calls, which on a GPU is the time to launch them.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, Protocol


class Counters:
    """Totals since the last reset."""

    def __init__(self) -> None:
        self.calls = 0
        self.quantized = 0
        self.deferred: Counter[str] = Counter()
        self.feedback: Counter[str] = Counter()
        self.last_sums: Counter[str] = Counter()
        self.exact_bytes = 0
        self.wire_bytes = 0
        self.remote_bytes = 0
        self.seconds = 0.0


_counters = Counters()
_lock = threading.Lock()


class Bytes(Protocol):
    """What a plan says of the bytes that this rank sends."""

    @property
    def exact_bytes(self) -> int: ...

    @property
    def wire_bytes(self) -> int: ...

    @property
    def remote_bytes(self) -> int: ...


def count_quantized(sent: Bytes, seconds: float) -> None:
    """One quantized collective."""
    with _lock:
        _counters.calls += 1
        _counters.quantized += 1
        _counters.exact_bytes += sent.exact_bytes
        _counters.wire_bytes += sent.wire_bytes
        _counters.remote_bytes += sent.remote_bytes
        _counters.seconds += seconds


def count_deferred(reason: str, exact_bytes: int, seconds: float = 0.0) -> None:
    """One collective left to the original implementation because of ``reason``."""
    with _lock:
        _counters.calls += 1
        _counters.deferred[reason] += 1
        _counters.exact_bytes += exact_bytes
        _counters.wire_bytes += exact_bytes
        _counters.seconds += seconds


def count_feedback(state: str) -> None:
    """One compressed sum with residual feedback ("on") or without, for a reason."""
    with _lock:
        _counters.feedback[state] += 1


def count_last_sum(bits: int) -> None:
    """One compressed sum that travelled in ``bits`` because it is the last one of its model."""
    with _lock:
        _counters.last_sums[f"{bits}-bit"] += 1


def stats() -> dict[str, Any]:
    """Totals since the last reset: calls, quantized, {exact,wire,remote}_bytes, seconds, and by reason:

    ``deferred`` collectives, and compressed sums with ``feedback`` ("on") and without. ``last_sums``: how many sums had
    a width of their own because they were the last ones of their models, by width.
    """
    with _lock:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(_counters).items()}


def reset_stats() -> None:
    """Set every counter to zero."""
    global _counters
    with _lock:
        _counters = Counters()
