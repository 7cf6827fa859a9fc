"""The shape of the code: imports go down only, heavy imports are lazy, everything is short and says what it is.

``LAYERS`` is the map. A module may import the package's modules of earlier rows, never of its own row or a later one;
inside a folder files may import each other. A new folder has to be given a row here.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "flashcomm_megatron"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
SOURCES = [ROOT / "setup.py", *MODULES, *SCRIPTS]
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())

LAYERS = (
    {"version", "codec"},
    {"config"},
    {"observe"},
    {"comm"},
    {"collectives"},
    {"megatron"},
    {"cpu", "tools"},
    {"__init__", "__main__"},
)
# Slow, or absent for those who use the codec alone.
LAZY = {"megatron", "transformer_engine", "wandb", "wandb_workspaces", "matplotlib"}

FUNCTION_LINES = 60
FILE_LINES = 400


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@lru_cache(None)
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def top(path: Path) -> str:
    """The package's module or folder that ``path`` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    """(line, dotted absolute name) of everything imported; ``from a import b`` gives ``a.b``."""
    home = path.relative_to(ROOT).with_suffix("").parts
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*home[: len(home) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def module_level(module: ast.Module) -> Iterator[ast.AST]:
    """Every node that runs at import: all but what lies inside functions and ``if TYPE_CHECKING``."""
    waiting: list[ast.AST] = [module]
    while waiting:
        node = waiting.pop()
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not typing_only:
            yield node
            waiting.extend(ast.iter_child_nodes(node))


def test_imports_go_down() -> None:
    rows = {module: row for row, modules in enumerate(LAYERS) for module in modules}
    assert {top(path) for path in MODULES} <= set(rows), "a module of the package has no row in LAYERS"
    upwards = []
    for path in MODULES:
        for line, target in imports(path, ast.walk(tree(path))):
            package, _, rest = target.partition(".")
            module = rest.split(".")[0]
            if package != PACKAGE.name or module in (top(path), "version") or (module, top(path)) == ("_C", "codec"):
                continue
            # What is not a module of ours is the compiled extension or a name that __init__ exports.
            if rows.get(module, rows["__init__"]) >= rows[top(path)]:
                upwards.append(f"{name(path)}:{line} imports {target}")
    assert not upwards


def test_heavy_imports_are_lazy() -> None:
    assert not [
        f"{name(path)}:{line} imports {target} at module level"
        for path in MODULES
        for line, target in imports(path, module_level(tree(path)))
        if target.split(".")[0] in LAZY
    ]


def test_every_module_says_what_it_is() -> None:
    assert not [name(path) for path in SOURCES if not ast.get_docstring(tree(path))]


def test_functions_are_short() -> None:
    assert not [
        f"{name(path)}:{node.lineno} {node.name}"
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= FUNCTION_LINES
    ]


def test_files_hold_one_idea() -> None:
    assert not [name(path) for path in [*SOURCES, *NATIVE] if path.read_text().count("\n") > FILE_LINES]


def test_no_machine_is_named() -> None:
    """No path of somebody's machine and no package host in any tracked file."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    # Put together here, or this file would name them.
    folders = [f"/{folder}/" for folder in ("work", "root", "home", "tmp")]
    hosts = ["-".join(("index", "url")), "-".join(("find", "links")), "pypi." + "org", "python" + "hosted"]
    words = folders + hosts
    for path in filter(Path.is_file, (ROOT / line for line in listed.stdout.splitlines())):
        text = path.read_bytes().decode(errors="replace")
        found = [word for word in words if word in text]
        assert not found, f"{name(path)} names {found}"
