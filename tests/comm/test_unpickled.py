"""Nothing that is read from files or other processes can run code: no pickle, torch.load with weights only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for folder in ("flashcomm_megatron", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"}


def unsafe(node: ast.AST) -> bool:
    """Whether the node imports or calls what may run code that it was sent."""
    if isinstance(node, ast.Import):
        return bool(UNSAFE_MODULES & {alias.name for alias in node.names})
    if isinstance(node, ast.ImportFrom):
        return node.module in UNSAFE_MODULES
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    if called == "torch.load":
        return {word.arg: ast.unparse(word.value) for word in node.keywords}.get("weights_only") != "True"
    return called.split(".")[-1] in UNSAFE_CALLS and not called.endswith(".eval")


def test_no_file_or_message_can_run_code() -> None:
    assert not [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if unsafe(node)
    ]


@pytest.mark.parametrize("line", ["import pickle", "from dill import loads", "exec(x)", "torch.load(f)", "a.eval(b)"])
def test_what_is_unsafe(line: str) -> None:
    assert any(map(unsafe, ast.walk(ast.parse(line)))) == (line != "a.eval(b)")
