"""The flags: what they store, when they switch on, what they refuse, and how they get into Megatron's parser."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import forks
import pytest
import torch
from command_lines import clear_variables, installs_of, parser, refused

import flashcomm_megatron as fc
from flashcomm_megatron import config
from flashcomm_megatron.megatron import arguments, installation
from flashcomm_megatron.megatron.arguments import config_from
from flashcomm_megatron.megatron.patching import PatchError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No configuration before and after, and none from the environment."""
    clear_variables(monkeypatch)
    config.set_current(None)
    monkeypatch.setattr(config, "_finished", None)
    yield
    config.set_current(None)


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every time the flag patched Megatron; nothing is patched."""
    return installs_of(monkeypatch)


# ---- on and off -----------------------------------------------------------------------------------------------------


def test_without_the_flag_nothing_changes(installs: list[str]) -> None:
    namespace = parser().parse_args(["--lr", "0.1"])
    assert {name: value for name, value in vars(namespace).items() if value is not None} == {"lr": 0.1}
    assert config.current() is None and installs == []


def test_the_flag_for_bits_alone_switches_on(installs: list[str]) -> None:
    namespace = parser().parse_args(["--flash-comm-bits", "4"])
    assert namespace.flash_comm_bits == 4 and namespace.flash_comm_recipe is None
    assert config.current() == fc.Config(bits=4) and installs == ["install"]


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_flags_does_not_matter(installs: list[str], first: bool) -> None:
    bits, rest = ["--flash-comm-bits", "8"], ["--flash-comm-recipe", "flash-v1", "--flash-comm-block", "64"]
    parser().parse_args([*bits, *rest] if first else [*rest, *bits])
    assert config.current() == fc.Config(bits=8, recipe="flash-v1", block=64)


def test_every_field_has_its_flag_and_help(installs: list[str]) -> None:
    text = "".join(parser().format_help().split())  # argparse also breaks lines at hyphens
    for field in fields(fc.Config):
        assert f"--flash-comm-{field.name.replace('_', '-')}" in text
        assert "".join(field.metadata["help"].split()) in text


def test_values_arrive_at_their_fields(installs: list[str]) -> None:
    line = """--flash-comm-bits 5 --flash-comm-recipe auto --flash-comm-block 128 --flash-comm-min-bytes 0
        --flash-comm-transport group --flash-comm-algorithm two-step --flash-comm-strict"""
    parser().parse_args(line.split())
    assert config.current() == fc.Config(
        bits=5, recipe="auto", block=128, min_bytes=0, transport="group", algorithm="two-step", strict=True
    )


def test_parsing_again_replaces_the_configuration(installs: list[str]) -> None:
    one = parser()
    one.parse_args(["--flash-comm-bits", "4"])
    one.parse_args(["--flash-comm-bits", "6"])
    assert config.current() == fc.Config(bits=6)


def test_known_args_subparsers_and_parents_switch_on_too(installs: list[str]) -> None:
    parser().parse_known_args(["--flash-comm-bits", "4", "--unknown"])
    assert config.current() == fc.Config(bits=4)
    outer = argparse.ArgumentParser()
    fc.add_arguments(outer.add_subparsers().add_parser("generate"))
    outer.parse_args(["generate", "--flash-comm-bits", "5"])
    assert config.current() == fc.Config(bits=5)
    child = argparse.ArgumentParser(parents=[parser(add_help=False)])
    child.parse_args(["--flash-comm-block", "64", "--flash-comm-bits", "6"])
    assert config.current() == fc.Config(bits=6, block=64)


def test_adding_our_arguments_twice_is_harmless(installs: list[str]) -> None:
    one = parser()
    assert fc.add_arguments(one) is one
    one.parse_args(["--flash-comm-bits", "4"])
    assert installs == ["install"]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--flash-comm-bits 9", "--flash-comm-bits 9: choose 2 to 8."),
        ("--flash-comm-bits 1", "--flash-comm-bits 1: choose 2 to 8."),
        ("--flash-comm-bits 4 --flash-comm-recipe best", "--flash-comm-recipe best: choose auto, flash-v1"),
        ("--flash-comm-recipe flash-v1 --flash-comm-bits 5", "choose 4, 6 or 8 with recipe flash-v1."),
        ("--flash-comm-block 7 --flash-comm-bits 4", "--flash-comm-block 7: choose a multiple of 8."),
        ("--flash-comm-bits 4 --flash-comm-transport pigeon", "--flash-comm-transport pigeon: choose"),
        ("--flash-comm-recipe auto", "--flash-comm-recipe does nothing without --flash-comm-bits: add"),
        ("--flash-comm-strict", "--flash-comm-strict does nothing without --flash-comm-bits: add"),
    ],
)
def test_a_wrong_combination_is_one_sentence(
    installs: list[str], capsys: pytest.CaptureFixture[str], line: str, sentence: str
) -> None:
    printed = refused(capsys, line)
    assert printed.startswith("train.py: error: ") and printed.count("\n") == 1
    assert sentence in printed


def test_a_width_that_is_no_number_is_argparses_error(installs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "argument --flash-comm-bits: invalid int value: 'four'" in refused(capsys, "--flash-comm-bits four")
    assert installs == []


def test_a_megatron_that_does_not_fit_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def install(*options: object) -> None:
        raise PatchError("flash-comm cannot patch x: it does not exist.")

    monkeypatch.setattr(installation, "install", install)
    assert refused(capsys, "--flash-comm-bits 4") == "train.py: error: flash-comm cannot patch x: it does not exist.\n"


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("0.11.0", r"flash-comm needs megatron-core >= 0.13 \(found 0.11.0\): before 0.13 .* takes no group"),
        ("0.12.3rc1", r"flash-comm needs megatron-core >= 0.13 \(found 0.12.3rc1\)"),
    ],
)
def test_a_megatron_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, sentence: str) -> None:
    monkeypatch.setattr(installation, "megatron_version", lambda: version)
    with pytest.raises(PatchError, match=sentence):
        installation.install()


def test_a_missing_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(PatchError, match="which cannot be imported: "):
        installation.install()


def test_the_kill_switch_leaves_megatron_untouched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASH_COMM_DISABLE", "1")
    monkeypatch.setattr(
        installation.patching, "apply", lambda table: pytest.fail("patched in spite of the kill switch")
    )
    parser().parse_args(["--flash-comm-bits", "4"])
    assert "flash-comm: off, because FLASH_COMM_DISABLE is set." in capsys.readouterr().out


# ---- other doors ----------------------------------------------------------------------------------------------------


def test_a_default_switches_on_as_the_flag_does(installs: list[str]) -> None:
    one = parser()
    one.set_defaults(flash_comm_bits=4, flash_comm_feedback="off")
    one.parse_args([])
    assert config.current() == fc.Config(bits=4, feedback="off") and installs == ["install"]


def test_a_namespace_that_is_handed_in_switches_on(installs: list[str]) -> None:
    parser().parse_args([], argparse.Namespace(flash_comm_bits=6))
    assert config.current() == fc.Config(bits=6) and installs == ["install"]


def test_finished_arguments_decide(installs: list[str]) -> None:
    """YAML, a checkpoint, a Ray driver: what they say is in force, whatever the flag said before."""
    parser().parse_args(["--flash-comm-bits", "8"])
    finished = argparse.Namespace(flash_comm_bits=4, lr=0.1)
    arguments.enable_from(finished)
    assert config.current() == fc.Config(bits=4)
    assert finished.flash_comm_recipe == "auto" and finished.flash_comm_bits == 4


def test_finished_arguments_that_say_nothing_are_made_to_say_what_is_in_force(installs: list[str]) -> None:
    fc.enable(bits=8)
    finished = argparse.Namespace(lr=0.1)
    arguments.enable_from(finished)
    assert finished.flash_comm_bits == 8 and config_from(finished) == config.current()


def test_finished_arguments_stay_as_they_are_with_flash_comm_off(installs: list[str]) -> None:
    finished = argparse.Namespace(lr=0.1)
    arguments.enable_from(finished)
    assert vars(finished) == {"lr": 0.1} and installs == []


def test_finished_arguments_that_are_changed_later_are_named(installs: list[str]) -> None:
    finished = argparse.Namespace(flash_comm_bits=4)
    arguments.enable_from(finished)
    fc.enable(bits=6)  # the way to do it
    assert config.changed() is None
    finished.flash_comm_bits = 8
    assert "flash_comm_bits was changed from 4 to 8 after set_args, which does nothing" in (config.changed() or "")


@pytest.mark.parametrize("before", ["", "flash_comm_bits=4, flash_comm_strict=True"])
def test_the_end_names_arguments_that_were_changed_late(stub: Path, before: str) -> None:
    """Where nothing was on it is a sentence; where a strict configuration was, an error."""
    source = f"{DOOR}args = Namespace({before})\nglobal_vars.set_args(args)\nargs.flash_comm_bits = 8\n"
    ran = python(source, path=stub)
    assert f"flash_comm_bits was changed from {4 if before else None} to 8" in ran.stderr
    assert ran.returncode == bool(before)


def test_a_finished_combination_that_no_recipe_knows_is_refused(installs: list[str]) -> None:
    with pytest.raises(ValueError, match="--flash-comm-bits 9: choose 2 to 8"):
        arguments.enable_from(argparse.Namespace(flash_comm_bits=9))
    assert config.current() is None


def test_an_option_that_does_not_exist_is_refused_in_finished_arguments(installs: list[str]) -> None:
    finished = argparse.Namespace(flash_comm_bits=4, flash_comm_recip="flash-v1")
    with pytest.raises(ValueError, match="flash_comm_recip is no option of flash-comm: choose flash_comm_algorithm, "):
        arguments.enable_from(finished)
    assert config.current() is None


def test_set_args_is_a_door(stub: Path) -> None:
    source = f"{DOOR}global_vars.set_args(Namespace(flash_comm_bits=5))\n"
    source += "from flashcomm_megatron.config import current\nprint(current().bits, global_vars.ARGS.flash_comm_bits)"
    ran = python(source, path=stub)
    assert ran.stdout.splitlines() == ["installed", "5 5"], ran.stderr


def test_experts_rows_are_asked_for_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(installation, "install", lambda *options: asked.append(options))
    bits, experts = ["--flash-comm-bits", "4"], ["--flash-comm-experts"]
    for line in (bits + experts, experts + bits):
        asked.clear()
        argparse.ArgumentParser(parents=[parser(add_help=False)]).parse_args(line)
        assert asked[-1] == (True,)
        assert config.current() == fc.Config(bits=4, experts=True)


# ---- Megatron's parser ----------------------------------------------------------------------------------------------

ARGUMENTS = """
import argparse

def add_megatron_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--num-layers", type=int)
    return parser

def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser = add_megatron_arguments(parser)
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    return parser.parse_args()
"""
GLOBAL_VARS = "ARGS = None\n\ndef set_args(args):\n    global ARGS\n    ARGS = args\n"
INITIALIZE = "from megatron.training.arguments import parse_args\n"
EARLY = "import flashcomm_megatron as fc\nfrom megatron.training.initialize import parse_args\n"
LATE = "from megatron.training.initialize import parse_args\nimport flashcomm_megatron as fc\n"
PROVIDER = LATE + "parse_args = __import__('functools').partial(parse_args, fc.add_arguments)\n"
WATCHED = """
from flashcomm_megatron.megatron import arguments, installation
installation.install = lambda *options: print("installed")
"""
DOOR = EARLY + WATCHED + "from argparse import Namespace\nfrom megatron.training import global_vars\n"
DUMP = f"""{WATCHED}
print({{name: value for name, value in vars(parse_args()).items() if value is not None}})
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a megatron.training whose scripts import parse_args by name, as pretrain scripts do."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "megatron" / "training").mkdir(parents=True)
    modules = {"__init__": "", "arguments": ARGUMENTS, "initialize": INITIALIZE, "global_vars": GLOBAL_VARS}
    for name, source in modules.items():
        (folder / "megatron" / "training" / f"{name}.py").write_text(source)
    return folder


def python(source: str, *args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``source`` in an interpreter that finds this package and, before all else, ``path``."""
    folders = [str(folder) for folder in (path, ROOT, os.environ.get("PYTHONPATH")) if folder]
    return forks.python("-c", source, *args, PYTHONPATH=os.pathsep.join(folders), PYTHONWARNINGS="ignore")


@pytest.mark.parametrize("order", [EARLY, LATE, PROVIDER], ids=["early", "late", "provider"])
def test_the_flag_is_in_megatrons_parser_whatever_was_imported_first(stub: Path, order: str) -> None:
    ran = python(order + DUMP, "--num-layers", "2", "--flash-comm-bits", "4", path=stub)
    assert ran.stdout.splitlines() == ["installed", "{'num_layers': 2, 'flash_comm_bits': 4}"], ran.stderr


def test_without_the_import_the_flag_is_refused(stub: Path) -> None:
    ran = python(INITIALIZE + "parse_args()", "--flash-comm-bits", "4", path=stub)
    assert ran.returncode == 2 and "unrecognized arguments: --flash-comm-bits 4" in ran.stderr


def test_a_megatron_without_the_function_says_what_to_do(stub: Path, tmp_path: Path) -> None:
    package = tmp_path / "megatron" / "training"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()  # in front of the one that megatron-core brings from 0.19 on
    (package / "arguments.py").write_text("def parse_args(): pass\n")
    ran = python("import flashcomm_megatron, megatron.training.arguments", path=tmp_path)
    assert ran.returncode == 0
    assert "cannot patch megatron.training.arguments.add_megatron_arguments: it does not exist" in ran.stderr
    assert "extra_args_provider=flashcomm_megatron.add_arguments" in ran.stderr


def test_megatrons_own_parser_has_the_flag() -> None:
    checkout = os.environ.get("MEGATRON_LM")
    if not checkout:
        pytest.skip("MEGATRON_LM names no Megatron-LM checkout")
    source = EARLY.replace("initialize", "arguments") + "parse_args()"
    help = python(source, "--help", path=Path(checkout))
    if "ModuleNotFoundError" in help.stderr:
        pytest.skip(f"the checkout's own dependencies are missing: {help.stderr.splitlines()[-1]}")
    assert "flash-comm:" in help.stdout and "--flash-comm-bits N" in help.stdout, help.stderr
    wrong = python(source, "--flash-comm-bits", "9", path=Path(checkout))
    assert wrong.returncode == 2 and "--flash-comm-bits 9: choose 2 to 8." in wrong.stderr


def test_every_option_keeps_its_type_on_the_command_line(installs: list[str]) -> None:
    line = "--flash-comm-bits 4 --flash-comm-timeout 2.5 --flash-comm-block 64 --flash-comm-strict"
    made = config_from(parser().parse_args(line.split()))
    assert made == fc.Config(bits=4, timeout=2.5, block=64, strict=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": "4"}, r"--flash-comm-bits '4': choose int, not str\."),
        ({"bits": True}, r"--flash-comm-bits True: choose int, not bool\."),
        ({"block": "64"}, r"--flash-comm-block '64': choose int or None, not str\."),
        ({"block": 64.0}, r"--flash-comm-block 64.0: choose int or None, not float\."),
        ({"min_bytes": 1e6}, r"--flash-comm-min-bytes 1000000.0: choose int or None"),
        ({"strict": 1}, r"--flash-comm-strict 1: choose bool, not int\."),
        ({"timeout": "2"}, r"--flash-comm-timeout '2': choose float or None, not str\."),
        ({"calibration": Path("x")}, r"--flash-comm-calibration .*: choose str or None, not PosixPath\."),
    ],
)
def test_a_value_of_another_type_is_refused_at_once(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fc.Config(**({"bits": 4} | options))  # type: ignore[arg-type]


def test_what_is_no_configuration_is_refused(installs: list[str]) -> None:
    with pytest.raises(ValueError, match=r"enable\(4\): expected a Config, or options by name as in enable\(bits=4\)"):
        fc.enable(4)  # type: ignore[arg-type]
    assert config.current() is None and installs == []
    with pytest.raises(ValueError, match=r"config=4: expected a Config"):
        fc.all_reduce(torch.ones(8), None, 4)  # type: ignore[arg-type]
