"""A training run as rows of scalars by step, read from wherever it was logged.

A run is named by a JSON-lines file (``--flash-comm-metrics``), the folder or file of a local W&B run, or a W&B run path
``entity/project/run``. What is damaged or missing becomes a sentence in :attr:`Run.notes`; what is left is used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "flash-comm/"
TOTALS = ("wire-bytes", "exact-bytes", "quantized-calls", "deferred-calls", "seconds")  # counted since the start
PLAIN = {"_step": "step", "_timestamp": "time"}  # W&B's names
INSTALL_WANDB = "Run pip install 'flashcomm_megatron[wandb]'."


class CannotRead(ValueError):
    """A run that gives nothing at all: one sentence."""


@dataclass(frozen=True)
class Run:
    """One run. ``rows`` ascend in "step" and hold numbers only."""

    name: str
    source: str
    settings: Mapping[str, Any]  # what metrics.settings() said; empty if the run had none
    rows: list[dict[str, float]]
    notes: list[str] = field(default_factory=list)

    def series(self, name: str, until: float = float("inf")) -> tuple[list[float], list[float]]:
        """Steps and values of a scalar, up to and with step ``until``."""
        points = [(row["step"], row[name]) for row in self.rows if name in row and row["step"] <= until]
        return [step for step, _ in points], [value for _, value in points]


def names(runs: Iterable[Run], prefix: str = "") -> list[str]:
    """Every scalar of any run that begins with ``prefix``, sorted."""
    return sorted({name for run in runs for row in run.rows for name in row if name.startswith(prefix)})


def read(source: str) -> Run:
    """The run that ``source`` names. CannotRead if there is none or it holds no row."""
    path = Path(source)
    if path.is_dir():
        run = _read_folder(path)
    elif path.suffix == ".wandb":
        run = _read_wandb(path)
    elif path.exists():
        run = _read_lines(path)
    elif source.count("/") == 2 and path.suffix not in (".jsonl", ".json"):
        run = _read_service(source)
    else:
        raise CannotRead(f"{source}: no such file or folder, and no W&B run path (entity/project/run).")
    if not run.rows:
        raise CannotRead(" ".join([f"{source}: no logged step in it.", *run.notes, "Was the run logging at all?"]))
    if not names([run], OURS):
        run.notes.append(
            f"{run.name}: no flash-comm/* metrics, so only its other scalars are compared. Train with "
            "--flash-comm-bits, or with --flash-comm-min-bytes 1000000000000 as well to count an exact run's bytes."
        )
    return run


# ---- where a run comes from ---------------------------------------------------------------------------------------


def _read_lines(path: Path) -> Run:
    rows, bad = [], []
    settings: Mapping[str, Any] = {}
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            settings = row.get("config", {}).get("flash-comm", settings)
            rows += [row] if "step" in row else []
        except (ValueError, AttributeError):
            bad += [str(number)] if line.strip() else []
    torn = " (cut off while it was written)" if bad == [str(len(lines))] else ""
    note = f"{path}: line {', '.join(bad)} is no JSON{torn}: left out, {len(rows)} rows kept."
    return Run(path.stem, str(path), settings, _tidy(rows), [note] if bad else [])


def _read_folder(path: Path) -> Run:
    files = sorted([*path.glob("*.wandb"), *path.glob("*.jsonl")])
    if len(files) == 1:
        return read(str(files[0]))
    inner = sorted({file.parent.name for file in path.glob("*run-*/*.wandb")} or {file.name for file in files})
    choices = f": choose {', '.join(inner)}" if inner else ", neither *.wandb nor *.jsonl"
    raise CannotRead(f"{path}: {'more than one run' if inner else 'no run'} in this folder{choices}.")


def _read_wandb(path: Path) -> Run:
    """A local run, offline, running or crashed, from its ``run-ID.wandb`` file, which wandb's own command prints."""
    records, remark = _inspect(path)
    config: dict[str, Any] = {}
    rows = []
    for record in records:
        content = record.get(record["type"], {})
        if record["type"] == "history":
            rows.append({"_step": content.get("step", {}).get("num")} | content["item"])
        elif record["type"] in ("run", "config"):
            update = content if record["type"] == "config" else content.get("config", {})
            config |= update.get("update", {})
    notes = [f"{path}: {remark} {len(rows)} rows were read."] if remark else []
    return Run(path.stem.removeprefix("run-"), str(path), _ours(config), _tidy(rows), notes)


def _inspect(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The records of a ``.wandb`` file, and what wandb remarked about the file."""
    try:
        import wandb
    except ImportError as error:
        raise CannotRead(f"{path}: reading a W&B run needs wandb ({error}). {INSTALL_WANDB}") from error
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"WANDB_ERROR_REPORTING": "false"},
    )
    said = done.stderr.strip().removeprefix("wandb leet inspect: ")
    if "No such option" in said or "No such command" in said:
        raise CannotRead(f"{path}: wandb {wandb.__version__} cannot print a run's file: pip install 'wandb>=0.31'.")
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not records:
        raise CannotRead(f"{path}: it holds no W&B records (the run may have died before its first line). {said}")
    return records, said and f"wandb {said}."


def _read_service(source: str) -> Run:
    try:
        import wandb

        run = wandb.Api().run(source)
        rows = list(run.scan_history())
    except ImportError as error:
        raise CannotRead(f"{source}: reading a W&B run needs wandb ({error}). {INSTALL_WANDB}") from error
    except Exception as error:  # whatever the service, the network or the login raises
        raise CannotRead(
            f"{source}: no such file, and W&B did not give that run ({type(error).__name__}: {error}). "
            "Check the path and wandb login, or name the local run folder."
        ) from error
    return Run(str(run.name), source, _ours(run.config), _tidy(rows), [])


# ---- rows ---------------------------------------------------------------------------------------------------------


def _ours(config: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = config.get("flash-comm", {})
    return settings if isinstance(settings, Mapping) else {}


def _tidy(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Rows by ascending step with numbers only; a resumed run's totals go on from where they were."""
    before: dict[str, float] = {}
    offset: dict[str, float] = {}
    by_step: dict[float, dict[str, float]] = {}
    for raw in rows:
        row = {PLAIN.get(name, name): number for name, value in raw.items() if (number := _number(value)) is not None}
        for name in (OURS + total for total in TOTALS):
            if name in row:
                restarted = row[name] < before.get(name, 0)
                offset[name] = offset.get(name, 0) + (before[name] if restarted else 0)
                before[name] = row[name]
                row[name] += offset[name]
        if "step" in row:
            by_step.setdefault(row["step"], {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def _number(value: Any) -> float | None:
    """A number, or the name JSON gives to one it cannot hold; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        return None
    return float(value)
