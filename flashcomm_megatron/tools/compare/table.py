"""Final numbers of every run, at the last step that all of them have, and their differences to the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

from .runs import OURS, Run

LOSSES = ("lm loss", "loss", "train/loss", "train_loss")  # Megatron's name first
GIB = 2**30


class Comparison(NamedTuple):
    """What is compared: runs, the baseline first if there is one, and the scalar that counts as the loss."""

    runs: Sequence[Run]
    baseline: Run | None
    loss: str | None


class Row(NamedTuple):
    """One number of every run. ``values`` and ``differences`` are None where a run has no such number."""

    label: str
    values: list[float | None]
    differences: list[float | None]  # relative to the baseline; None where that says nothing


def loss_name(runs: Sequence[Run]) -> str | None:
    """The scalar to compare: Megatron's training loss, else a usual name, else the first that ends in "loss"."""
    known = [name for run in runs for name in run.names()]
    usual = [name for name in LOSSES if name in known]
    return next(iter(usual + [name for name in known if name.lower().endswith("loss")]), None)


def common_step(runs: Sequence[Run]) -> float:
    """The last step that every run has reached."""
    return min(run.rows[-1]["step"] for run in runs)


def final_rows(what: Comparison) -> list[Row]:
    """The table, baseline and differences included; rows that no run can fill are left out."""
    measures = _measures(what.runs, common_step(what.runs), what.loss)
    rows = [_row(label, [measure(run) for run in what.runs], what) for label, measure in measures]
    return [row for row in rows if any(value is not None for value in row.values)]


Measure = Callable[[Run], float | None]


def _measures(runs: Sequence[Run], until: float, loss: str | None) -> list[tuple[str, Measure]]:
    sites = sorted({name for run in runs for name in run.names(f"{OURS}rel-error/")})
    validation = sorted(
        {name for run in runs for name in run.names() if "val" in name.lower() and "loss" in name.lower()}
    )
    return [
        *([(f"{loss} (mean of the last tenth)", lambda run: _last_tenth(run, loss, until))] if loss else []),
        *[(f"{name} (last)", lambda run, name=name: _last(run, name, until)) for name in validation if name != loss],
        ("GiB sent by a rank", lambda run: _last(run, f"{OURS}wire-bytes", until, GIB)),
        ("GiB an exact run sends", lambda run: _last(run, f"{OURS}exact-bytes", until, GIB)),
        ("compression", lambda run: _last(run, f"{OURS}compression", until)),
        ("steps/s (median)", lambda run: _middle(throughput(run, until)[1])),
        ("seconds in collectives", lambda run: _last(run, f"{OURS}seconds", until)),
        ("calls deferred", lambda run: _last(run, f"{OURS}deferred-calls", until)),
        *[(f"relative error, {site(name)}", lambda run, name=name: _mean(run, name, until)) for name in sites],
        ("NaN blocks sampled", lambda run: _sum(run, f"{OURS}nan-blocks", until)),
        ("last step of the run", lambda run: run.rows[-1]["step"]),
    ]  # fmt: skip


def site(name: str) -> str:
    """The site kind in the name of a sampled error."""
    return name.rpartition("/")[2]


def throughput(run: Run, until: float = math.inf) -> tuple[list[float], list[float]]:
    """Steps, and the steps per second since the row before."""
    rows = [row for row in run.rows if "time" in row and row["step"] <= until]
    rates = [
        (later["step"], (later["step"] - earlier["step"]) / (later["time"] - earlier["time"]))
        for earlier, later in pairwise(rows)
        if later["time"] > earlier["time"]
    ]
    return [step for step, _ in rates], [rate for _, rate in rates]


def _row(label: str, values: list[float | None], what: Comparison) -> Row:
    base = values[0] if what.baseline else None
    return Row(label, values, [None, *(_difference(value, base) for value in values[1:])])


def _difference(value: float | None, base: float | None) -> float | None:
    if value is None or not base or not math.isfinite(value) or not math.isfinite(base):
        return None
    return value / base - 1


def _last_tenth(run: Run, name: str, until: float) -> float | None:
    steps, values = run.series(name, until)
    recent = [value for step, value in zip(steps, values, strict=True) if step > 0.9 * until]
    return fmean(recent or values[-1:]) if values else None


def _last(run: Run, name: str, until: float, unit: float = 1) -> float | None:
    _, values = run.series(name, until)
    return values[-1] / unit if values else None


def _mean(run: Run, name: str, until: float) -> float | None:
    _, values = run.series(name, until)
    return fmean(values) if values else None


def _sum(run: Run, name: str, until: float) -> float | None:
    _, values = run.series(name, until)
    return sum(values) if values else None


def _middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None
