"""What the user is told without asking: one line that says what is on, and a loud one if it did nothing.

A job that is believed compressed and is not is the worst outcome, and Megatron has several implementations of every
layer. So the first forward that runs a row-parallel layer, of whatever kind, is watched through torch's module
hooks. Before it the line is printed, on rank 0; after it the counters tell whether anything was compressed, and the
classes seen tell which layers were out of reach. Then the hooks are gone. A process that ends without such a forward
is told so as well.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections import Counter
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .. import environment
from ..codec import native as extension
from ..codec.recipes import RECIPES
from ..config import Config, current
from . import counters

logger = logging.getLogger("flashcomm_megatron")
KEPT_EXACT = "embedding, output layer, router, loss"
# In the class name of every implementation of the layer, or of its base; the last one runs it inside, as no module.
# Beginnings of the reasons for which a user expects a collective to stay exact. All others are worth a word.
EXPECTED = ("one rank", "empty", "below ", "dtype int", "dtype uint", "dtype bool", "gradients exact")
ROW_PARALLEL = ("RowParallelLinear", "TEFusedMLP")


class _FirstForward:
    """Watches until one outermost module that ran row-parallel layers has returned."""

    def __init__(self, patched: str, reached: type | tuple[type, ...]) -> None:
        self.patched, self.reached = patched, reached
        self.outermost: Any = None
        enter, leave = map(torch.compiler.disable, (self.enter, self.leave))  # the first forward may be a compiled one
        self.hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]

    def enter(self, module: torch.nn.Module, args: Any) -> None:
        if self.outermost is None:
            say(headline(self.patched))
            self.outermost, self.layers, self.before = module, Counter[type](), counters.stats()
        if _is_row_parallel(module):
            self.layers[type(module)] += 1

    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if module is not self.outermost:
            return
        self.outermost = None
        if self.layers and output is not None:  # None: the forward raised
            stop()
            self.judge()

    def judge(self) -> None:
        """Warn of what this forward left uncompressed; with ``strict``, raise if that is everything."""
        foreign = {kind.__name__: n for kind, n in self.layers.items() if not issubclass(kind, self.reached)}
        now = counters.stats()
        deferred = Counter(now["deferred"]) - Counter(self.before["deferred"])
        nothing = now["quantized"] == self.before["quantized"]
        if foreign:
            complain(
                f"the model uses {_listed(foreign)}, whose communication is not patched. Add --transformer-impl local.",
                fatal=nothing,
            )
        elif nothing:
            complain(
                f"after the first forward no collective was quantized (deferred: {_listed(deferred)}).", fatal=True
            )


_watch: _FirstForward | None = None
_was_started = False
_said: set[str] = set()


def start(patched: str, reached: type | tuple[type, ...]) -> None:
    """Watch the next forward. ``patched`` is the end of the line; ``reached`` the row-parallel classes we compress."""
    global _watch, _was_started
    stop()
    _watch, _was_started = _FirstForward(patched, reached), True
    atexit.unregister(close)
    atexit.register(close)


def stop() -> None:
    """Watch no longer."""
    global _watch
    if _watch is not None:
        for hook in _watch.hooks:
            hook.remove()
    _watch = None


def close() -> None:
    """End of the process: what was saved, or a complaint that nothing flash-comm could have compressed ever ran."""
    atexit.unregister(close)
    if current() is None or getattr(sys, "last_value", None) is not None:
        return
    if _watch is None:
        say(summary())
    else:
        stop()
        complain("no tensor-parallel layer ran, so nothing was compressed.", fatal=True)


def ignored(argv: list[str]) -> None:
    """Complain if ``argv`` holds our flags and nothing ever read them, say because of ``parse_known_args``."""
    flags = [word for word in argv if word.startswith("--flash-comm-")]
    if flags and not _was_started and not environment.is_disabled():
        complain(
            f"the script did not read {flags[0]}. Let it call flashcomm_megatron.add_arguments(parser).", fatal=False
        )


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
        f"flash-comm: {config.bits}-bit {config.recipe}{block}, {gradients}{extension.describe()}, {patched}; "
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
        + (f"; left exact: {_listed(surprising)}" if surprising else "")
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
        raise RuntimeError(f"flash-comm is on ({config.bits}-bit) but {what} (--flash-comm-strict)")
    if what not in _said:
        _said.add(what)
        complain(what, fatal=False)


def say(line: str) -> None:
    """Print ``line`` on rank 0, once."""
    if _rank() == 0 and line not in _said:
        _said.add(line)
        print(line, flush=True)


def complain(what: str, fatal: bool) -> None:
    """Warn on rank 0; raise RuntimeError on every rank if ``fatal`` and the configuration is strict."""
    config: Config | None = current()
    message = f"flash-comm is on ({config.bits}-bit) but {what}" if config else f"flash-comm: {what}"
    if fatal and config is not None and config.strict:
        raise RuntimeError(f"{message} (--flash-comm-strict)")
    if _rank() == 0:
        logger.warning(message)


def _is_row_parallel(module: torch.nn.Module) -> bool:
    return any(name in kind.__name__ for name in ROW_PARALLEL for kind in type(module).__mro__)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} x {name}" for name, n in counts.items()) or "nothing"


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
