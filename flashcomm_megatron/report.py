"""What is installed, what was found and what is in force: the first thing to look at, and to paste into an issue."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from typing import Any

import torch

from . import environment, extension, patching, seams, training_log
from .arguments import FLAG
from .config import TRANSPORTS, current
from .version import __version__


class Report(dict[str, Any]):
    """Findings by name; printed as a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        rows = [f"{name:{width}}  {value}" for name, value in self.items() if name != "seams"]
        states = [f"  {state:10}  {path}" for path, state in self["seams"]]
        return "\n".join([*rows, "seams", *(states or ["  none without Megatron"])])

    __repr__ = __str__


def report() -> Report:
    """Versions, compiled extension or why not, transports, environment, state, and how every seam fits.

    Imports Megatron if it is installed, which takes seconds; changes nothing.
    """
    try:
        megatron, rows = seams.megatron_version(), patching.status(seams.rows()) + _training_seams()
    except patching.PatchError as error:
        megatron, rows = f"none ({error.__cause__})", []
    return Report(
        {
            "flashcomm_megatron": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": megatron,
            "codec": extension.describe(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "transports": ", ".join(name for name in TRANSPORTS if name != "auto"),
            "environment": ", ".join(f"{name}={os.environ[name]}" for name in environment.KNOWN if name in os.environ)
            or "no FLASH_COMM_* variable set",
            "state": _state(),
            "seams": rows,
        }
    )


def main(argv: list[str]) -> int:
    """``python -m flashcomm_megatron report``: print the report."""
    if argv:
        print(f"report takes no arguments, found {' '.join(argv)}.")
        return 2
    print(report())
    return 0


def _state() -> str:
    if environment.is_disabled():
        return "off, FLASH_COMM_DISABLE is set"
    config = current()
    return f"on, {config}" if config else "off"


def _training_seams() -> list[tuple[str, str]]:
    """The rows of parser and log, where they exist: the megatron-core wheel comes without megatron.training."""
    return patching.status([FLAG, training_log.SEAM]) if find_spec("megatron.training") else []
