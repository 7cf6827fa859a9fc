"""What a thread may be doing, and what a kernel must not."""

WARP = 32
RUNNING, AT_SYNC, AT_BARRIER, AT_WARPSYNC, AT_CLOCK, ENDED = range(6)
STATES = ["runs", "BSYNC", "BAR", "WARPSYNC", "clock", "ended"]


class KernelError(Exception):
    """The kernel did what it must not: the place, and why."""


class DivergenceError(KernelError):
    """Lanes that should meet wait at different places."""
