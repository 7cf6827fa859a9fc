"""Environment variables as a door: in force where nothing else is, and refused where they would do nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from command_lines import clear_variables, installs_of, parser, refused

import flashcomm_megatron as fc
from flashcomm_megatron import config
from flashcomm_megatron.megatron import arguments
from flashcomm_megatron.observe import messages


@pytest.fixture(autouse=True)
def installs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One entry for every time Megatron would have been patched. No variable is set, no configuration in force."""
    clear_variables(monkeypatch)
    calls = installs_of(monkeypatch)
    config.set_current(None)
    yield calls
    config.set_current(None)


@pytest.mark.parametrize("line", ["--flash-comm-bits 4", "--lr 0.1"])
def test_an_unknown_variable_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    monkeypatch.setenv("FLASH_COMM_BIT", "4")
    printed = refused(capsys, line)
    assert "FLASH_COMM_BIT is no variable of flash-comm: choose FLASH_COMM_BITS or" in printed


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("FLASH_COMM_FEEDBACK", "off", "FLASH_COMM_FEEDBACK does nothing without FLASH_COMM_BITS"),
        ("FLASH_COMM_DISABLE", "false", "FLASH_COMM_DISABLE=false: choose 1 to keep Megatron untouched, 0"),
    ],
)
def test_a_variable_that_does_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    assert sentence in refused(capsys, "--flash-comm-bits 4")


def test_a_variable_that_a_flag_overrules_is_said(
    monkeypatch: pytest.MonkeyPatch, installs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASH_COMM_BITS", "4")
    monkeypatch.setattr(messages, "_said", set())
    parser().parse_args(["--flash-comm-bits", "8"])
    arguments.enable_from_environment()
    assert "FLASH_COMM_BITS is not used" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [False, True])
def test_a_variable_switches_on_where_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch, installs: list[str], flag: bool
) -> None:
    monkeypatch.setenv("FLASH_COMM_BITS", "4")
    monkeypatch.setenv("FLASH_COMM_FEEDBACK", "off")
    if flag:
        parser().parse_args(["--flash-comm-bits", "8"])
    arguments.enable_from_environment()
    assert config.current() == (fc.Config(bits=8) if flag else fc.Config(bits=4, feedback="off"))


@pytest.mark.parametrize(
    ("text", "sentence"), [("four", "FLASH_COMM_BITS=four is no number"), ("9", "--flash-comm-bits 9: choose")]
)
def test_a_variable_that_is_no_width_is_refused(
    monkeypatch: pytest.MonkeyPatch, installs: list[str], text: str, sentence: str
) -> None:
    monkeypatch.setenv("FLASH_COMM_BITS", text)
    with pytest.raises(ValueError, match=sentence):
        arguments.enable_from_environment()
