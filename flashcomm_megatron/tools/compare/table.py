"""Final numbers of every run, at the last step that all of them have, and their differences to the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

from .runs import OURS, Run, names

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
    known = [name for run in runs for name in names([run])]
    usual = [name for name in LOSSES if name in known]
    return next(iter(usual + [name for name in known if name.lower().endswith("loss")]), None)


def common_step(runs: Sequence[Run]) -> float:
    """The last step that all runs have reached, but those that ended before half of the longest (they crashed)."""
    ends = [last_step(run) for run in runs]
    return min(end for end in ends if 2 * end >= max(ends))


def last_step(run: Run) -> float:
    return run.rows[-1]["step"]


def ended_early(runs: Sequence[Run]) -> list[Run]:
    """The runs whose numbers stand at their own last step, since they never reached the common one."""
    return [run for run in runs if last_step(run) < common_step(runs)]


Measure = Callable[[Run, float], float | None]  # one number of a run, up to and with a step


def final_rows(what: Comparison) -> list[Row]:
    """The table, baseline and differences included; rows that no run can fill are left out."""
    rows = [_row(*measured, what) for measured in _measures(what.runs, what.loss)]
    return [row for row in rows if any(value is not None for value in row.values)]


def _row(label: str, measure: Measure, is_compared: bool, what: Comparison) -> Row:
    """Values at the common step; a difference at the last step that the run and the baseline share with it."""
    until = common_step(what.runs)
    differences = [None, *(difference(measure, run, what) if is_compared else None for run in what.runs[1:])]
    return Row(label, [measure(run, until) for run in what.runs], differences)


def difference(measure: Measure, run: Run, what: Comparison) -> float | None:
    """By how much a number of ``run`` differs from the baseline's, relatively; None where that says nothing."""
    if what.baseline is None:
        return None
    until = min(common_step(what.runs), last_step(run), last_step(what.baseline))
    value, base = measure(run, until), measure(what.baseline, until)
    if value is None or not base or not math.isfinite(value) or not math.isfinite(base):
        return None
    return value / base - 1


def _measures(runs: Sequence[Run], loss: str | None) -> list[tuple[str, Measure, bool]]:
    """Label, measure, and whether a difference to the baseline says something."""
    sites = names(runs, f"{OURS}rel-error/")
    validation = [name for name in names(runs) if "val" in name.lower() and "loss" in name.lower()]
    return [
        *([(f"{loss} (mean of the last tenth)", final_loss(loss), True)] if loss else []),
        *[(f"{name} (last)", last(name), True) for name in validation if name != loss],
        ("GiB sent by a rank", last(f"{OURS}wire-bytes", GIB), True),
        ("GiB an exact run sends", last(f"{OURS}exact-bytes", GIB), False),
        ("compression", last(f"{OURS}compression"), False),
        ("steps/s (median)", speed, True),
        ("seconds in collectives", last(f"{OURS}seconds"), True),
        ("calls deferred", last(f"{OURS}deferred-calls"), False),
        *[(f"relative error, {site(name)}", _over(name, fmean), False) for name in sites],
        ("NaN blocks sampled", _over(f"{OURS}nan-blocks", sum), False),
        ("last step of the run", lambda run, until: last_step(run), False),
    ]


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


def last(name: str, unit: float = 1) -> Measure:
    """The newest value of a scalar, in ``unit``."""
    return _over(name, lambda values: values[-1] / unit)


def _over(name: str, combine: Callable[[list[float]], float]) -> Measure:
    def measure(run: Run, until: float) -> float | None:
        _, values = run.series(name, until)
        return combine(values) if values else None

    return measure


def final_loss(name: str) -> Measure:
    """The mean of a loss over the last tenth of the steps."""

    def measure(run: Run, until: float) -> float | None:
        steps, values = run.series(name, until)
        recent = [value for step, value in zip(steps, values, strict=True) if step > 0.9 * min(until, last_step(run))]
        return fmean(recent or values[-1:]) if values else None

    return measure


def speed(run: Run, until: float) -> float | None:
    """Steps per second, the median."""
    _, rates = throughput(run, until)
    return median(rates) if rates else None
