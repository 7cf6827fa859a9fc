"""What is installed, what was found and what is in force: the first thing to look at, and to paste into an issue."""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..codec import native
from ..collectives import minimum_size
from ..config import VARIABLES, current, is_disabled
from ..megatron import checkout, installation, patching, seams, training_log
from ..megatron.arguments import SEAMS as DOORS
from ..observe import counters, messages
from ..version import __version__


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
        with warnings.catch_warnings():  # Megatron's, about optimizers and the like
            warnings.simplefilter("ignore")
            megatron, table = installation.megatron_version(), [*installation.rows(with_tokens=True)]
            table += [*DOORS, training_log.SEAM] if find_spec("megatron.training") else []  # the wheel has none
            rows = patching.status(table)
    except patching.PatchError as error:
        megatron, rows = f"none ({error.__cause__})", []
    kernels = ["peer", "host"] if native.cuda() is not None else []
    transports = kernels + ["shared-memory"] * native.available() + ["group"]
    return Report(
        {
            "flashcomm_megatron": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": megatron,
            "codec": native.describe(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "transports": ", ".join(transports),
            "environment": ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
            or "no FLASH_COMM_* variable set",
            "minimum sizes": _least(),
            "state": _state(),
            "feedback": _feedback(),
            "last sums": messages.listed(counters.stats()["last_sums"]),
            "seams": rows,
        }
    )


def report_on(megatron: Path, transformer_engine: Path | None = None) -> Report:
    """How every seam fits a Megatron-LM checkout, or a folder of packages, that is read and not imported.

    Transformer Engine is looked for in a folder of its own, beside Megatron, and where it is installed; without it the
    seams in its layers are left out. PatchError if there is no Megatron.
    """
    version, folders = checkout.version(megatron), [transformer_engine or megatron, megatron]
    installed = find_spec("transformer_engine")
    if installed is not None and installed.origin is not None:
        folders.append(Path(installed.origin).parent.parent)
    found = checkout.has("transformer_engine.pytorch", *folders)
    rows = [*seams.rows_of(version, found, with_tokens=True)]
    rows += [row for row in (*DOORS, training_log.SEAM) if checkout.has(row.module, *folders)]
    return Report(
        {
            "flashcomm_megatron": __version__,
            "megatron-core": f"{version} in {megatron}",
            "transformer-engine": "found" if found else "none, so the seams in its layers are left out",
            "seams": checkout.status(rows, *folders),
        }
    )


def main(argv: list[str]) -> int:
    """``python -m flashcomm_megatron report``: print a report; 1 if a checkout's seams do not all fit."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcomm_megatron report",
        description="Say what is installed, what was found and what is in force. Exit code 1: with --megatron, a "
        "seam does not fit that checkout.",
        epilog="Example: python -m flashcomm_megatron report --json > report.json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--megatron", type=Path, metavar="DIR", help="a checkout to read instead of what is installed")
    parser.add_argument("--transformer-engine", type=Path, metavar="DIR", help="Transformer Engine's sources for it")
    options = parser.parse_args(argv)
    if options.megatron is None:
        _print(report(), options.json)
        return 0
    try:
        found = report_on(options.megatron, options.transformer_engine)
    except patching.PatchError as error:
        parser.exit(2, f"{parser.prog}: error: {error}.\n")
    _print(found, options.json)
    return int(not all(state.startswith("fits") for _, state in found["seams"]))


def _print(found: Report, as_json: bool) -> None:
    """The table, or an object whose "seams" are {path: state}."""
    print(json.dumps({**found, "seams": dict(found["seams"])}, indent=1) if as_json else found)


def _state() -> str:
    if is_disabled():
        return "off, FLASH_COMM_DISABLE is set"
    config = current()
    return f"on, {config}" if config else "off"


def _least() -> str:
    """From how many bytes on tensors are compressed."""
    config = current()
    if config and config.min_bytes is not None:
        return str(config.min_bytes)
    defaults = ", ".join(f"{wire} {nbytes}" for wire, nbytes in minimum_size.DEFAULTS.items())
    defaults += "".join(
        f"; {name} at least {nbytes} from each rank" for name, nbytes in minimum_size.MINIMUM_OF_COLLECTIVE.items()
    )
    if not config or not config.thresholds:
        return defaults
    if reason := minimum_size.problem(config.thresholds):
        return reason
    rows = [
        f"\n  {where}: {', '.join(map(str, case))}: {'never' if nbytes == minimum_size.NEVER else nbytes}"
        for where, table in minimum_size.read(config.thresholds).items()
        for case, nbytes in table.items()
    ]
    return f"{config.thresholds}{''.join(rows)}\n  all others: {defaults}"


def _feedback() -> str:
    """Whether residual feedback is on, and how many compressed sums had it, or had not and why."""
    config, counted = current(), counters.stats()["feedback"]
    state = f"{config.feedback}: " if config else ""
    return state + (", ".join(f"{n} x {what}" for what, n in counted.items()) or "no sum so far")
