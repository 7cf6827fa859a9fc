"""The patch engine: replaces names in other packages, all of a table or none, and puts the same objects back.

A :class:`Seam` is one row of a table: which name, which leading parameters our replacement relies on, how to make
the replacement from the original, and why this name reaches its callers. :func:`apply` first imports, looks up and
compares every row, and only when all of them fit rebinds any. :func:`revert` restores the very objects it found and
refuses when somebody has patched over us, because undoing ours would then undo theirs.

A replacement never breaks a caller
-----------------------------------
Newer versions add arguments to the functions we replace. A replacement either takes ``*args, **kwargs`` and passes
them on, or it names what it knows. Then :func:`fit` compares it with the original: every caller of the original must
be able to call the replacement. An argument that the replacement does not name, given with a value other than its
default, goes to the original: the replacement runs around an original that has the argument bound, and
:func:`unknown_argument` tells it that it must call that original and count the call.

torch.compile breaks its graph at a replaced name. Nothing here knows Megatron; which names are replaced stands in
seams.py.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch

logger = logging.getLogger(__name__)
Function = Callable[..., Any]
Replace = Callable[[Function], Function]  # original -> replacement
F = TypeVar("F", bound=Function)


_traced: list[list[Any]] = []  # functions that torch.compile may still look into


def untraced(function: F) -> F:
    """``function``, into which torch.compile does not look; what a layer's replacement calls needs it.

    torch.compile's machinery is imported by the first :func:`apply`, not by importing this package.
    """
    callee = [function]

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        return callee[0](*args, **kwargs)

    _traced.append(callee)
    return cast(F, outside)


class Seam(NamedTuple):
    """One name to replace. ``name`` may be dotted: a method or a staticmethod (which stays one) of a class."""

    module: str
    name: str
    params: tuple[str, ...]  # leading parameters the replacement relies on: the guard against drift
    replace: Replace
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
    disable: Any = torch.compiler.disable
    while _traced:
        callee = _traced.pop()
        callee[0] = disable(callee[0])
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


def apply_late(seam: Seam, instead: str = "") -> None:
    """Replace one name of a module that was imported just now. Where it does not fit, nothing ends: a warning says what
    to do ``instead``, if anything must be done."""
    try:
        apply([seam])
    except PatchError as error:
        if instead:
            logger.warning("%s\nUntil then %s", error, instead)
        else:
            logger.debug("%s", error)


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
    """Path and state of every row: "patched", "patched again by ...", "fits", or why it does not fit.

    "fits" is followed by the arguments with which a call is left to the original.
    """
    return [(seam.path, _state(seam)) for seam in seams]


def _state(seam: Seam) -> str:
    binding = _applied.get(seam.path)
    if binding is None:
        try:
            return fit(seam, _function(find(seam)[2]))
        except PatchError as problem:
            return str(problem)
    return "patched" if binding.found is binding.replacement else f"patched again by {_origin(binding.found)}"


def _bind(seam: Seam) -> _Binding:
    """Look the name up, compare its parameters and make its replacement; nothing is rebound yet."""
    owner, attribute, original = find(seam)
    function = _function(original)
    fit(seam, function)
    replacement = _accepting_all(seam, function)
    if inspect.isfunction(replacement):  # a class that stands in for a class keeps its own name
        # What replaces a name counts, plans and waits: nothing that torch.compile could trace.
        outside: Any = functools.partial(torch.compiler.disable, recursive=not seam.is_layer)
        replacement = outside(replacement)
        functools.update_wrapper(replacement, function)
    is_static = isinstance(original, staticmethod)
    return _Binding(owner, attribute, original, staticmethod(replacement) if is_static else replacement)


def find(seam: Seam) -> tuple[Any, str, Any]:
    """The module or class that holds the name, the last part of the name, and the object bound to it."""
    try:
        owner: Any = importlib.import_module(seam.module)
    except ImportError as error:
        raise PatchError(f"{seam.module} cannot be imported ({error})") from error
    *parents, attribute = seam.name.split(".")
    for parent in parents:
        if not hasattr(owner, parent):
            raise PatchError(f"{parent} does not exist")
        owner = getattr(owner, parent)
    if attribute not in vars(owner):
        raise PatchError("it does not exist")
    return owner, attribute, vars(owner)[attribute]


def _function(bound: Any) -> Any:
    return bound.__func__ if isinstance(bound, staticmethod) else bound


# ---- whole signatures ---------------------------------------------------------------------------------------------


class _Call(threading.local):
    unknown: str | None = None


_call = _Call()


def unknown_argument() -> str | None:
    """The argument because of which the replacement that is running must call its original, or None."""
    return _call.unknown


def fit(seam: Seam, original: Any) -> str:
    """ "fits", and which arguments are left to the original; PatchError if some call of it breaks the replacement."""
    theirs = _leading(original, seam.params)
    replacement = seam.replace(original)
    if not seam.params or not inspect.isfunction(replacement) or _passes_all_on(replacement):
        return "fits"
    ours = inspect.signature(replacement).parameters
    for (name, mine), other in zip(ours.items(), [*theirs.values(), None], strict=False):
        if other is None or name != other.name:
            raise PatchError(f"its replacement takes {name} where the original has {other or 'nothing'}")
        if mine.default is mine.empty and other.default is not other.empty:
            raise PatchError(f"its replacement needs {name}, which the original does not")
        if mine.default is not mine.empty and other.default is not UNREAD and mine.default != other.default:
            raise PatchError(f"the default of {name} was {mine.default!r} and is {other.default!r}")
    left = [name for name in theirs if name not in ours]
    return f"fits; with {' or '.join(left)} the original is called" if left else "fits"


UNREAD = object()  # the default of a parameter that was read in a source and is no literal: nothing to compare with


def _leading(original: Any, expected: tuple[str, ...]) -> Mapping[str, inspect.Parameter]:
    """Parameters of ``original``, which must begin with ``expected``; an empty table row asks for none."""
    if not expected and callable(original):
        return {}
    try:
        found = inspect.signature(original).parameters
    except (TypeError, ValueError) as error:
        raise PatchError(
            f"expected a function with parameters ({', '.join(expected)}, ...), found {original!r}"
        ) from error
    if tuple(found)[: len(expected)] != expected:
        raise PatchError(f"expected parameters ({', '.join(expected)}, ...), found ({', '.join(found)})")
    return found


def _passes_all_on(replacement: Function) -> bool:
    kinds = {each.kind for each in inspect.signature(replacement).parameters.values()}
    return {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds


def _accepting_all(seam: Seam, original: Function) -> Function:
    """The replacement, callable with everything that the original is: what it does not name goes to the original."""
    replacement = seam.replace(original)
    if not seam.params or not inspect.isfunction(replacement) or _passes_all_on(replacement):
        return replacement
    signature, known = inspect.signature(original), frozenset(inspect.signature(replacement).parameters)
    if known == frozenset(signature.parameters):
        return replacement

    def accepting_all(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= len(known) and known.issuperset(kwargs):
            return replacement(*args, **kwargs)
        given = _flat(signature.bind(*args, **kwargs))
        more = {name: value for name, value in given.items() if name not in known}
        asked = [name for name, value in more.items() if not _is_default(signature, name, value)]
        mine = {name: value for name, value in given.items() if name in known}
        if not asked:
            return replacement(**mine)
        outer, _call.unknown = _call.unknown, asked[0]
        try:
            return seam.replace(functools.partial(original, **more))(**mine)
        finally:
            _call.unknown = outer

    return accepting_all


def _flat(given: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments by name, those that only the original's ``**kwargs`` names among them."""
    kinds = given.signature.parameters
    rest = [name for name in given.arguments if kinds[name].kind is inspect.Parameter.VAR_KEYWORD]
    flat = {name: value for name, value in given.arguments.items() if name not in rest}
    return flat | {key: value for name in rest for key, value in given.arguments[name].items()}


def _is_default(signature: inspect.Signature, name: str, value: Any) -> bool:
    """Whether leaving the argument out would mean the same; tensors and the like are never equal to a default."""
    default = signature.parameters[name].default if name in signature.parameters else inspect.Parameter.empty
    return value is default or (isinstance(value, bool | int | float | str) and bool(value == default))


def _origin(found: Any) -> str:
    """Who bound this object, as far as it tells."""
    function = _function(found)
    code = getattr(function, "__code__", None)
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name
