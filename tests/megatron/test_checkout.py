"""Seams looked up in sources: names are followed to their functions, drift is named, and nothing is imported."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from flashcomm_megatron.__main__ import main
from flashcomm_megatron.megatron import checkout, patching, seams
from flashcomm_megatron.megatron.patching import PatchError, Seam

PAGE = Path(__file__).resolve().parents[2] / "docs" / "versions.md"
SOURCES = {
    "megatron/core/package_info.py": "MAJOR = 0\nMINOR = 16\nPATCH = 2\nPRE_RELEASE = 'rc1'\n",
    "megatron/core/__init__.py": "raise RuntimeError('imported')\n",
    "megatron/core/names.py": """
import torch
from .deeper import there as here
from . import deeper
from megatron.core.deeper import Layer
try:
    if torch:
        gather = torch.distributed.all_gather_into_tensor
except RuntimeError:
    gather = None
if torch:
    def chosen(x, *, y): ...
else:
    def chosen(z): ...
number = 3
""",
    "megatron/core/deeper/__init__.py": "from .deepest import there\nfrom .deepest import Layer\n",
    "megatron/core/deeper/deepest.py": """
def there(a: int, b=1, *rest, **others): ...
class Layer:
    @staticmethod
    def forward(ctx, x): ...
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Megatron of a few lines that must not be imported."""
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def seam(name: str, *params: str, module: str = "megatron.core.names") -> Seam:
    return Seam(module, name, params, lambda original: original, "a test")


@pytest.mark.parametrize(
    "row",
    [
        seam("here", "a", "b"),
        seam("Layer.forward", "ctx", "x"),
        seam("gather", "output_tensor", "input_tensor", "group", "async_op"),
        seam("chosen", "x", "y"),
        seam("barrier", "group", module="torch.distributed"),
    ],
    ids=lambda row: row.name,
)
def test_names_are_found_in_a_source_tree(folder: Path, row: Seam) -> None:
    assert checkout.status([row], folder) == [(row.path, "fits")]


@pytest.mark.parametrize(
    ("row", "state"),
    [
        (seam("here", "a", "c"), "expected parameters (a, c, ...), found (a: int, b, rest, others)"),
        (seam("missing", "a"), "missing does not exist"),
        (seam("Layer.backward", "ctx"), "it does not exist"),
        (seam("number", "x"), "3 is not there"),
        (seam("x", module="megatron.core.absent"), "megatron.core.absent is not there"),
    ],
    ids=lambda row: getattr(row, "name", ""),
)
def test_a_seam_that_does_not_fit_says_why(folder: Path, row: Seam, state: str) -> None:
    assert checkout.status([row], folder) == [(row.path, state)]


def test_the_version_of_a_source_tree_is_read(folder: Path, tmp_path: Path) -> None:
    assert checkout.version(folder) == "0.16.2rc1"
    with pytest.raises(PatchError, match="holds no Megatron"):
        checkout.version(tmp_path / "megatron")


def test_the_command_reports_on_a_checkout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--megatron", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"0.16.2rc1 in {folder}" in out and "none, so the seams in its layers are left out" in out
    assert all(row.path in out for row in seams.SEAMS)
    assert "megatron.core.tensor_parallel.layers is not there" in out
    with pytest.raises(SystemExit) as ended:
        main(["report", "--megatron", str(folder / "megatron")])
    assert ended.value.code == 2 and "holds no Megatron" in capsys.readouterr().err


# ---- the installed version ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages() -> Path:
    """The folder that holds the installed megatron-core."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[2]


def test_sources_say_what_the_live_objects_say(packages: Path) -> None:
    assert checkout.version(packages) == sys.modules["megatron.core"].__version__
    assert checkout.status(seams.SEAMS, packages) == patching.status(seams.SEAMS)


def columns(page: str) -> dict[str, dict[str, str]]:
    """State by version and seam, of the tables of the page."""
    found: dict[str, dict[str, str]] = {}
    head: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")] if line.startswith("|") else []
        head = cells if cells[:1] == ["seam"] else head
        for version, state in zip(head[1:], cells[1:], strict=False):
            found.setdefault(version, {})[cells[0]] = state
    return found


def test_the_page_tells_the_truth_about_the_installed_version(packages: Path) -> None:
    version: Any = checkout.version(packages)
    column = columns(PAGE.read_text()).get(version)
    assert column is not None, f"docs/versions.md has no column {version}: run benchmarks/version_matrix.py"
    live = dict(patching.status(seams.SEAMS))
    assert {path: column.get(path) for path in live} == live


def test_the_page_knows_every_seam() -> None:
    rows = {path for column in columns(PAGE.read_text()).values() for path in column}
    assert {seam.path for seam in (*seams.SEAMS, *seams.OPTIONAL)} <= rows, "run benchmarks/version_matrix.py"
