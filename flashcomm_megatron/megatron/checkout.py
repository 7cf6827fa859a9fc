"""Which seams fit a Megatron that is only read, never imported.

Importing a Megatron takes seconds and, from 0.18 on, needs triton and a GPU's worth of packages; a checkout one thinks
of moving to is often not importable at all. But a seam needs only a name with certain leading parameters, and those
stand in the source. So a name is followed through modules, imports, classes and assignments of the syntax tree until a
``def`` is found. What leads to torch is looked up in the torch that is running.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from . import patching
from .patching import PatchError, Seam

INFO = Path("megatron", "core", "package_info.py")


def version(folder: Path) -> str:
    """Version of the Megatron-Core under ``folder``, a checkout or a folder of packages; PatchError without one."""
    if not (folder / INFO).is_file():
        raise PatchError(f"{folder} holds no Megatron: there is no {INFO} in it")
    values = {name: node.value for name, node in _names(_tree(folder / INFO)) if isinstance(node, ast.Assign)}
    parts = [ast.literal_eval(values[name]) for name in ("MAJOR", "MINOR", "PATCH")]
    pre_release = values.get("PRE_RELEASE")
    return ".".join(map(str, parts)) + (ast.literal_eval(pre_release) if pre_release else "")


def status(seams: Iterable[Seam], *folders: Path) -> list[tuple[str, str]]:
    """Path and state of every row, as :func:`patching.status` says them: "fits", or why it does not fit."""
    return [(seam.path, _state(seam, folders)) for seam in seams]


def has(module: str, *folders: Path) -> bool:
    """Whether a module stands in one of the folders."""
    return _file(module, folders) is not None


def _state(seam: Seam, folders: Sequence[Path]) -> str:
    try:
        return patching.fit(seam, _function(seam.module, seam.name.split("."), folders))
    except PatchError as problem:
        return str(problem)


def _function(module: str, names: Sequence[str], folders: Sequence[Path]) -> Any:
    """The function that ``names`` leads to from ``module``, or one with its parameters."""
    if module.split(".")[0] == "torch":
        return functools.reduce(getattr, names, importlib.import_module(module))
    file = _file(module, folders)
    if file is None:
        raise PatchError(f"{module} is not there")
    node = _lookup(_tree(file), names[0])
    if isinstance(node, ast.ImportFrom):
        original = next(each.name for each in node.names if (each.asname or each.name) == names[0])
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        target = resolve_name("." * node.level + (node.module or ""), package)
        return _function(target, [original, *names[1:]], folders)
    if isinstance(node, ast.Assign):
        package, *rest = ast.unparse(node.value).split(".")
        return _function(package, [*rest, *names[1:]], folders)
    for name in names[1:]:
        node = _lookup(node, name)
    return _stand_in(node)


def _lookup(scope: ast.AST, name: str) -> Any:
    """The statement that binds ``name`` in a module or class: the first, for fallbacks come last."""
    for found, node in _names(scope):
        if found == name:
            return node
    raise PatchError("it does not exist" if not isinstance(scope, ast.Module) else f"{name} does not exist")


def _names(scope: Any) -> Iterator[tuple[str, Any]]:
    """Every name bound in the statements of a module or class, those under ``if`` and ``try`` included."""
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((each.asname or each.name, node) for each in node.names)
        elif isinstance(node, ast.Assign):
            yield from ((each.id, node) for each in node.targets if isinstance(each, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            yield from _names(node)
            yield from _names(ast.Module(node.orelse, []))
            yield from (found for handler in getattr(node, "handlers", ()) for found in _names(handler))


def _stand_in(node: Any) -> Any:
    """A function with the parameters of one that is only read."""
    if not isinstance(node, ast.FunctionDef):
        raise PatchError("expected a function")
    given, kinds = node.args, inspect.Parameter
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    found: list[tuple[ast.arg | None, Any, ast.expr | None]] = [
        *((each, kinds.POSITIONAL_OR_KEYWORD, default) for each, default in zip(plain, defaults, strict=True)),
        (given.vararg, kinds.VAR_POSITIONAL, None),
        *(
            (each, kinds.KEYWORD_ONLY, default)
            for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        ),
        (given.kwarg, kinds.VAR_KEYWORD, None),
    ]

    def function(*args: Any, **kwargs: Any) -> None: ...

    parameters = [kinds(each.arg, kind, default=_default(default)) for each, kind, default in found if each is not None]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


def _default(default: ast.expr | None) -> Any:
    """A default as it stands in the source; one that is no literal is only known to be there."""
    if default is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(default)
    except ValueError:
        return patching.UNREAD


def _file(module: str, folders: Sequence[Path]) -> Path | None:
    path = Path(*module.split("."))
    candidates = (folder / each for folder in folders for each in (path.with_suffix(".py"), path / "__init__.py"))
    return next((file for file in candidates if file.is_file()), None)


@functools.lru_cache(maxsize=64)
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))
