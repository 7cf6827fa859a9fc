"""patches/: they only add, what they add exists and works, and their script notices what does not fit."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flashcomm_megatron as fc
from flashcomm_megatron import config
from flashcomm_megatron.megatron import arguments, installation, patching

FOLDER = Path(__file__).resolve().parents[2] / "patches"
PATCHES = sorted(FOLDER.glob("*.patch"))
PLAIN = "def add_megatron_arguments(parser):\n    return parser\n"
NATIVE = PLAIN.replace("return parser", "import flashcomm_megatron as fc\n    return fc.add_arguments(parser)")


def script() -> Any:
    """patches/make.py as a module."""
    spec = importlib.util.spec_from_file_location("make_patches", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_one_for_every_supported_version() -> None:
    assert [path.stem for path in PATCHES] == [f"core_v0.{minor}" for minor in range(13, 20)]


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_patch_only_adds_and_what_it_adds_exists(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [line[6:] for line in lines if line.startswith("--- a/")] == list(script().ADDITIONS)
    assert not [line for line in lines if line.startswith("-") and not line.startswith("--- a/")]
    added = [line[1:].strip() for line in lines if line.startswith("+") and not line.startswith("+++ ") and line != "+"]
    assert added == [
        "import flashcomm_megatron",
        "parser = flashcomm_megatron.add_arguments(parser)",
        "from flashcomm_megatron.megatron.arguments import enable_from",
        "enable_from(args)",
    ]
    assert fc.add_arguments is arguments.add_arguments and callable(arguments.enable_from)


def test_finished_arguments_switch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[Any] = []
    monkeypatch.setattr(installation, "install", lambda *options: installed.append(config.current()))
    arguments.enable_from(argparse.Namespace(num_layers=2))
    arguments.enable_from(argparse.Namespace(flash_comm_bits=None))
    assert not installed and config.current() is None
    arguments.enable_from(argparse.Namespace(flash_comm_bits=4, flash_comm_strict=True))
    arguments.enable_from(argparse.Namespace(flash_comm_bits=4, flash_comm_strict=True))
    assert installed == [fc.Config(bits=4, strict=True)]
    config.set_current(None)


@pytest.mark.parametrize("source", [PLAIN, NATIVE])
def test_a_patched_parser_is_left_alone(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    native = source is NATIVE
    module = ModuleType(arguments.MEGATRON_ARGUMENTS)
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, arguments.MEGATRON_ARGUMENTS, module)
    before = module.add_megatron_arguments
    arguments._patch_parser()
    try:
        assert (module.add_megatron_arguments is before) == native
        parser = module.add_megatron_arguments(argparse.ArgumentParser())
        assert sum(group.title == "flash-comm" for group in parser._action_groups) == 1
    finally:
        patching.revert([arguments.FLAG])


# ---- the script -----------------------------------------------------------------------------------------------------

ARGUMENTS = "def add_megatron_arguments(parser):\n    parser = first(parser)\n\n    return parser\n"
INITIALIZE = "def initialize_megatron():\n    args = get_args()\n    initialize_rerun_state_machine(\n        args)\n"


def release(git: Path, tag: str, initialize: str) -> None:
    """Commit and tag a Megatron-LM of two files."""
    (git / "megatron" / "training").mkdir(parents=True, exist_ok=True)
    (git / "megatron" / "training" / "arguments.py").write_text(ARGUMENTS)
    (git / "megatron" / "training" / "initialize.py").write_text(initialize)
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*who, "commit", "-q", "--allow-empty", "-m", tag), ("tag", tag)):
        subprocess.run(["git", *command], cwd=git, check=True, capture_output=True)


def test_the_script_writes_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, git, folder = script(), tmp_path / "git", tmp_path / "patches"
    folder.mkdir()
    monkeypatch.setattr(make, "FOLDER", folder)
    release(git, "core_v0.12.9", INITIALIZE)
    release(git, "core_v0.16.0", INITIALIZE + "# older\n")
    release(git, "core_v0.16.1", INITIALIZE)
    monkeypatch.setattr(sys, "argv", ["make.py", str(git)])
    assert make.main() == 0
    assert [path.name for path in folder.iterdir()] == ["core_v0.16.patch"]
    assert capsys.readouterr().out.splitlines() == [
        "core_v0.16.0    core_v0.16.patch   applies",
        "core_v0.16.1    core_v0.16.patch   applies",
    ]
    release(git, "core_v0.16.2", "def initialize_megatron():\n    pass\n")
    monkeypatch.setattr(sys, "argv", ["make.py", str(git), "--check"])
    assert make.main() == 1
    assert "patch does not apply" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"initialize\.py has no line"):
        make.make(git, "core_v0.16.2")
