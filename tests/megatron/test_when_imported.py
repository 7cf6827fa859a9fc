"""The lazy import hook: the callback comes once, after the module has run, whoever imports it and however."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashcomm_megatron.megatron.when_imported import _Finder, when_imported


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of the package ``late``, with a module ``late.target`` that defines ``value``."""
    folder = tmp_path / "late"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "target.py").write_text("value = 1\n")
    (folder / "other.py").write_text("from late.target import value\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "late"]:
        del sys.modules[name]


def waiting() -> int:
    return sum(isinstance(finder, _Finder) and finder._name.startswith("late") for finder in sys.meta_path)


def test_the_callback_comes_after_the_module_has_run(package: Path) -> None:
    seen = []
    when_imported("late.target", lambda: seen.append(sys.modules["late.target"].value))
    assert seen == [] and "late" not in sys.modules
    importlib.import_module("late.other")  # imports the target by name, from within another import
    assert seen == [1]
    assert waiting() == 0


def test_a_module_that_is_there_is_called_for_at_once(package: Path) -> None:
    importlib.import_module("late.target")
    seen = []
    when_imported("late.target", lambda: seen.append("called"))
    assert seen == ["called"] and waiting() == 0


def test_only_once_and_the_loader_is_left_as_it_was(package: Path) -> None:
    seen = []
    when_imported("late.target", lambda: seen.append("called"))
    target = importlib.import_module("late.target")
    importlib.reload(target)
    assert seen == ["called"]
    assert "exec_module" not in vars(target.__spec__.loader)


def test_a_module_that_does_not_exist_is_waited_for(package: Path) -> None:
    seen = []
    when_imported("late.missing", lambda: seen.append("called"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("late.missing")
    (package / "missing.py").write_text("")
    importlib.invalidate_caches()
    importlib.import_module("late.missing")
    assert seen == ["called"]


def test_a_module_that_fails_is_waited_for(package: Path) -> None:
    (package / "target.py").write_text("raise RuntimeError('first time')\n")
    seen = []
    when_imported("late.target", lambda: seen.append("called"))
    with pytest.raises(RuntimeError, match="first time"):
        importlib.import_module("late.target")
    assert seen == [] and waiting() == 1
    (package / "target.py").write_text("value = 'mended'\n")
    importlib.invalidate_caches()
    importlib.import_module("late.target")
    assert seen == ["called"]


def test_two_callbacks_for_one_module(package: Path) -> None:
    seen = []
    when_imported("late.target", lambda: seen.append("first"))
    when_imported("late.target", lambda: seen.append("second"))
    importlib.import_module("late.target")
    assert sorted(seen) == ["first", "second"]
