"""What each row-parallel layer did in the first forward, and the verdict at the end of the process.

A job that is believed compressed and is not is the worst outcome, and Megatron has several implementations of every
layer. So the first forward that runs a row-parallel layer, of whatever kind, is watched through torch's module hooks.
Before it one line is printed, on rank 0. After it every row-parallel layer that neither compressed nor deferred a sum
is named: it communicates by names that we do not replace, whatever its class. Then the hooks are gone, until another
model is built or met (model.py): each is judged by its own first forward, also one that was built before, or copied.
A process that ends without such a forward is told so as well, and so is one whose arguments were changed too late.

Under ``--flash-comm-strict`` both are errors, and so is every earlier one that the script caught: the process ends with
an exit code other than 0 when the script returns, by SystemExit of any code, by an exception or a signal, and where it
is a child of multiprocessing. ``os._exit`` and ``os.exec`` are excepted, which nobody sees.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util
import os
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
)

from ..config import changed, current, is_disabled
from ..observe import counters, messages
from . import experts, model

FUSED = "TEFusedMLP"  # runs its row-parallel layer inside, as no module
PATIENCE = 100  # forwards that are watched for layers that are there and do not run


class _Watch:
    """Judges every row-parallel layer once, by the first forward of an outermost module that runs it.

    torch's forward hooks are there as long as a layer that was built or met has not run; what is built, torch tells as
    well. A model that is met while there are no hooks is under way: what is judged are the parts that still run.
    """

    def __init__(self, patched: str) -> None:
        self.patched = patched
        self.outermost: Any = None
        self.has_judged = False
        self.judged: WeakSet[torch.nn.Module] = WeakSet()
        self.waiting: WeakSet[torch.nn.Module] = WeakSet()  # built or met, and not run yet
        self.building = register_module_module_registration_hook(self.built)
        self.hooks: list[Any] = []
        model.watch(self.met)
        self.resume()

    def resume(self) -> None:
        enter, leave = map(torch.compiler.disable, (self.enter, self.leave))  # the first forward may be a compiled one
        self.hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        self.is_whole, self.left = True, PATIENCE

    def rest(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def stop(self) -> None:
        self.rest()
        self.building.remove()
        model.watch(None)

    def built(self, module: torch.nn.Module, name: str, submodule: Any) -> None:
        model.hold(module, name, submodule)
        self.expect([submodule])

    def met(self, modules: Iterable[torch.nn.Module]) -> None:
        was_watched = bool(self.hooks)
        self.expect(modules)
        self.is_whole = self.is_whole and was_watched

    def expect(self, modules: Iterable[Any]) -> None:
        new = [module for module in modules if _sums(module) and module not in self.judged]
        self.waiting.update(new)
        if new and not self.hooks:
            self.resume()
        self.left = PATIENCE if new else self.left

    def enter(self, module: torch.nn.Module, args: Any) -> None:
        if self.outermost is None:
            messages.say(messages.headline(self.patched))
            self.outermost, self.before = module, counters.stats()
            self.running: list[tuple[Any, int]] = []  # row layers, and the collectives counted when they began
            self.silent: dict[torch.nn.Module, bool] = {}  # row layers: whether nothing was counted in any call
        if module not in self.judged and _sums(module):
            self.running.append((module, counters.stats()["calls"]))

    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self.running and self.running[-1][0] is module:
            _, before = self.running.pop()
            self.silent[module] = self.silent.get(module, True) and counters.stats()["calls"] == before
        if module is not self.outermost:
            return
        self.outermost = None
        if output is None:  # the forward raised
            return
        self.left = PATIENCE if self.silent else self.left - self.has_judged
        self.judged.update(self.silent)
        self.waiting.difference_update(self.silent)
        if (self.silent or self.has_judged) and (not self.waiting or self.left == 0):
            self.rest()
        if self.silent:
            self.has_judged = True
            experts.met(module)
            self.judge()

    def judge(self) -> None:
        """Warn of what this forward left uncompressed; raise where the configuration is strict."""
        silent = [module for module, is_silent in self.silent.items() if is_silent]
        now, otherwise = counters.stats(), changed()
        deferred = Counter(now["deferred"]) - Counter(self.before["deferred"])
        if otherwise:
            messages.complain(otherwise, fatal=True)
        if silent:
            kinds = Counter(type(module).__name__ for module in silent)
            messages.complain(
                f"the model uses {messages.listed(kinds)}, whose communication is not patched "
                f"(first: {model.name(silent[0])}). Add --transformer-impl local, or expect these sums to stay exact.",
                fatal=True,
            )
        elif self.is_whole and now["quantized"] == self.before["quantized"]:
            messages.complain(
                f"after the first forward no collective was quantized (deferred: {messages.listed(deferred)}).",
                fatal=True,
            )


_watch: _Watch | None = None
_was_started = False
_judged_by: int | None = None  # the process that ends with a verdict: a forked child takes over what its parent has


def start(patched: str) -> None:
    """Watch the next forward. ``patched`` is the end of the line that is printed before it."""
    global _watch, _was_started, _judged_by
    stop()
    if multiprocessing.parent_process() is not None and _judged_by != os.getpid():  # it may run no exit handlers
        multiprocessing.util.Finalize(None, _at_exit, exitpriority=0)
    _watch, _was_started, _judged_by = _Watch(patched), True, os.getpid()


def stop() -> None:
    """Watch no longer."""
    global _watch
    if _watch is not None:
        _watch.stop()
    _watch = None


def close() -> None:
    """End of the script: what was saved, or a complaint that nothing flash-comm could have compressed ever ran.

    RuntimeError where the configuration is strict and that, or an earlier complaint, holds.
    """
    atexit.unregister(_at_exit)
    if getattr(sys, "last_value", None) is not None:  # the script's own error ends the process
        return
    for what in () if is_disabled() else (changed(), experts.idle()):
        if what:
            messages.complain(what, fatal=True)
    if _watch is not None and not _watch.has_judged:
        stop()
        messages.complain("no tensor-parallel layer ran, so nothing was compressed.", fatal=True)
    elif _was_started and current() is not None:
        messages.say(messages.summary())
    messages.last_verdict()


def ignored(argv: list[str]) -> None:
    """Complain if ``argv`` holds our flags and nothing ever read them, say because of ``parse_known_args``.

    RuntimeError where one of them is ``--flash-comm-strict``.
    """
    flags = [word for word in argv if word.startswith("--flash-comm-")]
    if flags and not _was_started and not is_disabled():
        what = f"the script did not read {flags[0]}. Let it call flashcomm_megatron.add_arguments(parser)."
        if "--flash-comm-strict" in flags:
            raise RuntimeError(f"{what} (--flash-comm-strict)")
        messages.complain(what, fatal=False)


def _at_exit() -> None:
    """The verdict where no runner asks for it. An exit handler cannot choose the exit code, so it ends the process."""
    raised = sys.exc_info()[1]  # in a child of multiprocessing, whose error is printed after this
    if raised is not None and not isinstance(raised, SystemExit):
        return
    try:
        close()
    except RuntimeError as error:
        print(f"flashcomm_megatron: error: {error}", file=sys.stderr)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


atexit.register(_at_exit)  # at the import: before those of the script are registered, so that it runs behind them


def _sums(module: Any) -> bool:
    """Whether a module is a row-parallel layer, of whatever make, that has to sum by itself."""
    if not model.communicates_as_row(module) and not model.is_kind(module, FUSED):
        return False
    group = getattr(module, "tp_group", None)
    alone = group is not None and hasattr(group, "size") and group.size() == 1
    return not alone
