"""The patch engine: replaces names in other packages, all of a table or none, and puts the same objects back.

A :class:`Seam` is one row of a table: which name, which leading parameters our replacement relies on, how to make
the replacement from the original, and why this name reaches its callers. :func:`apply` first imports, looks up and
compares every row, and only when all of them fit rebinds any. :func:`revert` restores the very objects it found and
refuses when somebody has patched over us, because undoing ours would then undo theirs.

torch.compile breaks its graph at a replaced name. Nothing here knows Megatron; which names are replaced stands in
seams/.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)


class Seam(NamedTuple):
    """One name to replace. ``name`` may be dotted: a method or a staticmethod (which stays one) of a class."""

    module: str
    name: str
    params: tuple[str, ...]  # leading parameters the replacement relies on: the guard against drift
    replace: Callable[[Callable[..., Any]], Callable[..., Any]]  # original -> replacement
    why: str  # one sentence: who resolves this name, when
    is_layer: bool = False  # a module's forward: torch.compile breaks its graph here but still compiles the original

    @property
    def path(self) -> str:
        """Dotted path of the name."""
        return f"{self.module}.{self.name}"


class PatchError(RuntimeError):
    """A name cannot be replaced or restored; nothing was changed."""


class _Binding(NamedTuple):
    """A looked-up or applied row: where the name lives and the objects bound to it, staticmethod wrapper included."""

    owner: Any
    attribute: str
    original: Any
    replacement: Any

    @property
    def found(self) -> Any:
        """The object bound at this moment."""
        return vars(self.owner).get(self.attribute)


_applied: dict[str, _Binding] = {}


def apply(seams: Iterable[Seam]) -> None:
    """Replace every name of the table that is not replaced yet, or raise PatchError and replace none."""
    bindings, problems = {}, []
    for seam in seams:
        if seam.path not in _applied:
            try:
                bindings[seam.path] = _bind(seam)
            except PatchError as problem:
                problems.append(f"flash-comm cannot patch {seam.path}: {problem}.")
    if problems:
        raise PatchError("\n".join(problems) + " Run python -m flashcomm_megatron report and open an issue.")
    for path, binding in bindings.items():
        setattr(binding.owner, binding.attribute, binding.replacement)
        _applied[path] = binding
        logger.debug("patched %s", path)


def revert(seams: Iterable[Seam]) -> None:
    """Restore the original object of every name of the table, last first; raise PatchError if one is not ours now."""
    rows = [(seam.path, _applied[seam.path]) for seam in seams if seam.path in _applied]
    for path, binding in rows:
        if binding.found is not binding.replacement:
            raise PatchError(
                f"flash-comm cannot restore {path}: it was patched again by {_origin(binding.found)}. Undo that first."
            )
    for path, binding in reversed(rows):
        setattr(binding.owner, binding.attribute, binding.original)
        del _applied[path]
        logger.debug("restored %s", path)


def status(seams: Iterable[Seam]) -> list[tuple[str, str]]:
    """Path and state of every row: "patched", "patched again by ...", "fits", or why it does not fit."""
    return [(seam.path, _state(seam)) for seam in seams]


def _state(seam: Seam) -> str:
    binding = _applied.get(seam.path)
    if binding is None:
        try:
            _bind(seam)
        except PatchError as problem:
            return str(problem)
        return "fits"
    return "patched" if binding.found is binding.replacement else f"patched again by {_origin(binding.found)}"


def _bind(seam: Seam) -> _Binding:
    """Look the name up, compare its parameters and make its replacement; nothing is rebound yet."""
    owner, attribute = _owner(seam)
    if attribute not in vars(owner):
        raise PatchError("it does not exist")
    original = vars(owner)[attribute]
    is_static = isinstance(original, staticmethod)
    function = original.__func__ if is_static else original
    _compare(function, seam.params)
    replacement = seam.replace(function)
    if inspect.isfunction(replacement):  # a class that stands in for a class keeps its own name
        # What replaces a name counts, plans and waits: nothing that torch.compile could trace.
        outside: Any = functools.partial(torch.compiler.disable, recursive=not seam.is_layer)
        replacement = outside(replacement)
        functools.update_wrapper(replacement, function)
    return _Binding(owner, attribute, original, staticmethod(replacement) if is_static else replacement)


def _owner(seam: Seam) -> tuple[Any, str]:
    """The module or class that holds the name, and the last part of the name."""
    try:
        owner: Any = importlib.import_module(seam.module)
    except ImportError as error:
        raise PatchError(f"{seam.module} cannot be imported ({error})") from error
    *parents, attribute = seam.name.split(".")
    for parent in parents:
        if not hasattr(owner, parent):
            raise PatchError(f"{parent} does not exist")
        owner = getattr(owner, parent)
    return owner, attribute


def _compare(function: Any, expected: tuple[str, ...]) -> None:
    if not expected and callable(function):
        return
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise PatchError(
            f"expected a function with parameters ({', '.join(expected)}, ...), found {function!r}"
        ) from error
    if tuple(found)[: len(expected)] != expected:
        raise PatchError(
            f"expected parameters ({', '.join(expected)}, ...), found ({', '.join(map(str, found.values()))})"
        )


def _origin(found: Any) -> str:
    """Who bound this object, as far as it tells."""
    function = found.__func__ if isinstance(found, staticmethod) else found
    code = getattr(function, "__code__", None)
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name
