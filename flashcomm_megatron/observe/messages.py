"""What the user is told: the one line that says what is on, warnings, the closing line. The only printer.

Everything is said by rank 0 and once. What a strict configuration makes an error is raised on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from ..codec import native
from ..codec.recipes import RECIPES
from ..config import Config, current
from . import counters
from .screen import logger

KEPT_EXACT = "embedding, output layer, router, loss"
# Beginnings of the reasons for which a user expects a collective to stay exact. All others are worth a word.
EXPECTED = ("one rank", "empty", "below ", "dtype int", "dtype uint", "dtype bool", "gradients exact")
_said: set[str] = set()
_failed: str | None = None  # the first complaint that a strict configuration made an error
_raised: str | None = None  # and the first that it raised at once


def headline(patched: str) -> str:
    """The one line: widths, recipe, codec, what is patched, what stays exact."""
    config = current()
    assert config is not None
    block, kept = f" (block {config.legs.reduce.block})", KEPT_EXACT
    if RECIPES[config.recipe].calibrated:  # scales of its own for every feature
        block = ""
    gradients = f"gradients {config.grad_bits}-bit, "
    if config.gradient_legs is None:
        gradients, kept = "", f"gradients, {kept}"
    return (
        f"flash-comm: {config.bits}-bit {config.recipe}{block}, {gradients}{native.describe()}, {patched}; "
        f"exact: {kept}"
    )


def summary() -> str:
    """The closing line: calls compressed, and the bytes this rank sent beside those of the exact collectives."""
    counted = counters.stats()
    calls = counted["quantized"] + sum(counted["deferred"].values())
    wire, exact = counted["wire_bytes"], counted["exact_bytes"]
    ratio = f" ({exact / wire:.2f}x)" if wire else ""
    surprising = {why: n for why, n in counted["deferred"].items() if not why.startswith(EXPECTED)}
    return (
        f"flash-comm: compressed {counted['quantized']} of {calls} collectives; "
        f"rank 0 sent {wire / 2**20:.2f} MiB instead of {exact / 2**20:.2f} MiB{ratio}"
        + (f"; left exact: {listed(surprising)}" if surprising else "")
    )


def deferred(reason: str, exact_bytes: int, config: Config) -> None:
    """Count a collective that stays exact. If no user expects that, say so once, or raise where ``config`` is strict.

    ``reason`` must be the same on every rank, so that all raise or none.
    """
    counters.count_deferred(reason, exact_bytes)
    if not reason.startswith(EXPECTED):
        unexpected(f"a collective stays exact: {reason}", config)


def unexpected(what: str, config: Config) -> None:
    """Say once that something is not done as asked for; RuntimeError where ``config`` is strict."""
    if config.strict:
        raise _error(f"flash-comm is on ({config.bits}-bit) but {what}")
    complain(what, fatal=False)


def fell_back(what: str, ranks: Sequence[int], reason: str) -> None:
    """Say that the group of ``ranks``, whose first one calls this, does without ``what``; once a process."""
    is_span = len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    which = f"{ranks[0]} to {ranks[-1]}" if is_span else " and ".join(map(str, ranks))
    if _is_new(what):
        print(f"flash-comm: no {what} between ranks {which}, and maybe others: {reason}", flush=True)


def say(line: str) -> None:
    """Say ``line`` on rank 0, once, at level INFO."""
    if _rank() == 0 and _is_new(line):
        logger.info(line)


def warn(line: str) -> None:
    """Warn on this rank."""
    logger.warning(line)


def complain(what: str, fatal: bool) -> None:
    """Warn on rank 0, once; raise RuntimeError on every rank if ``fatal`` and the configuration is strict."""
    config: Config | None = current()
    message = f"flash-comm is on ({config.bits}-bit) but {what}" if config else f"flash-comm: {what}"
    if fatal and config is not None and config.strict:
        raise _error(message)
    if _rank() == 0 and _is_new(message):
        logger.warning(message)


def _is_new(line: str) -> bool:
    """Whether ``line`` was not said before; from now on it was."""
    is_new = line not in _said
    _said.add(line)
    return is_new


def fails_at_the_end(what: str, config: Config) -> None:
    """Warn on this rank of what was asked for and is not done; where ``config`` is strict, the exit code says so."""
    global _failed
    logger.warning(f"flash-comm: {what}")
    if config.strict:
        _failed = _failed or f"{what} (--flash-comm-strict)"


def raised() -> str | None:
    """The first error that a strict configuration raised, caught or not; None: there was none."""
    return _raised


def last_verdict() -> None:
    """RuntimeError once more if a strict configuration ever made an error of something: a script may have caught it."""
    if _failed is not None:
        raise RuntimeError(_failed)


def _error(message: str) -> RuntimeError:
    global _failed, _raised
    error = f"{message} (--flash-comm-strict)"
    _failed, _raised = _failed or error, _raised or error
    return RuntimeError(error)


def listed(counts: Mapping[str, int]) -> str:
    """Counts as text."""
    return ", ".join(f"{n} x {name}" for name, n in counts.items()) or "nothing"


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
