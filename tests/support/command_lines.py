"""A script's command line with our flags, in a process where nothing is switched on and Megatron is not patched."""

from __future__ import annotations

import argparse
import os

import pytest

import flashcomm_megatron as fc
from flashcomm_megatron.megatron import installation


def clear_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every variable of ours out of the environment."""
    for name in [name for name in os.environ if name.startswith("FLASH_COMM_")]:
        monkeypatch.delenv(name)


def installs_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every time that Megatron would have been patched from now on; nothing is patched."""
    calls: list[str] = []
    monkeypatch.setattr(installation, "install", lambda *options, **more: calls.append("install"))
    return calls


def parser(**options: object) -> argparse.ArgumentParser:
    """A script's parser, with an option of its own and ours."""
    made = argparse.ArgumentParser(prog="train.py", **options)  # type: ignore[arg-type]
    made.add_argument("--lr", type=float)
    return fc.add_arguments(made)


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What is printed when a command line is refused with exit code 2."""
    with pytest.raises(SystemExit) as exit:
        parser().parse_args(line.split())
    assert exit.value.code == 2
    return capsys.readouterr().err
