"""The figures: one small chart for each question, drawn by matplotlib for the page (SVG) and for papers (PNG).

Static pictures were chosen over a charting library in the page: one of those is megabytes of script in every file, and
what a reader needs beyond the curves are the exact numbers, which stand in the table. The size suits a phone's width;
wider screens show several side by side. Text stays text, and what is black in a PNG takes the page's text colour.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from .runs import OURS, Run, names
from .table import GIB, Comparison, site, throughput

SIZE = (4.6, 3.2)  # inches at 72 points each
INK = "#010203"  # stands for the page's text colour in an SVG
# Okabe and Ito's palette without black and yellow: told apart by colour-blind readers, visible on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.")
LOOK = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **{"font.size": 9, "axes.grid": True, "grid.color": "grey", "grid.alpha": 0.25, "axes.axisbelow": True},
}


class Plot(NamedTuple):
    """A chart. ``draw`` returns how many runs it could show."""

    name: str
    title: str
    draw: Callable[[Any, Comparison], int]


class Style(NamedTuple):
    """How one run looks in every chart."""

    colour: str
    dash: str


def style(index: int) -> Style:
    """The look of the ``index``-th run; the first one is the baseline's ink."""
    if index == 0:
        return Style(INK, "-")
    return Style(COLOURS[(index - 1) % len(COLOURS)], DASHES[(index - 1) // len(COLOURS) % len(DASHES)])


def _curves(axis: Any, runs: Sequence[Run], points: Callable[[Run], tuple[list[float], list[float]]]) -> int:
    drawn = 0
    for index, run in enumerate(runs):
        x, y = points(run)
        if x:
            look, marker = style(index), "o" if len(x) < 3 else None
            axis.plot(x, y, look.dash, color=look.colour, linewidth=1.3, marker=marker, label=short(run.name))
            drawn += 1
    return drawn


def short(name: str) -> str:
    """A name of any length, at most 48 characters of it: its begin and its end."""
    return name if len(name) <= 48 else f"{name[:23]}...{name[-22:]}"


def loss_label(what: Comparison) -> str:
    """The loss with its unit, where that is known: Megatron's is the mean over tokens of -ln p."""
    return f"{what.loss} (nats a token)" if str(what.loss).startswith("lm loss") else f"{what.loss or 'loss'}"


def _loss(axis: Any, what: Comparison) -> int:
    axis.set(xlabel="step", ylabel=loss_label(what))
    return _curves(axis, what.runs, lambda run: run.series(str(what.loss)))


def _loss_difference(axis: Any, what: Comparison) -> int:
    if what.baseline is None:
        return 0
    base = dict(zip(*what.baseline.series(str(what.loss)), strict=True))

    def points(run: Run) -> tuple[list[float], list[float]]:
        series = dict(zip(*run.series(str(what.loss)), strict=True))
        shared = [step for step in series if step in base]
        return shared, [series[step] - base[step] for step in shared]

    axis.set(xlabel="step", ylabel=f"difference of {loss_label(what)}")
    return _curves(axis, what.runs, points)


def _loss_by_bytes(axis: Any, what: Comparison) -> int:
    def points(run: Run) -> tuple[list[float], list[float]]:
        rows = [row for row in run.rows if f"{OURS}wire-bytes" in row and what.loss in row]
        return [row[f"{OURS}wire-bytes"] / GIB for row in rows], [row[str(what.loss)] for row in rows]

    axis.set(xlabel="sent by one rank in tensor-parallel collectives (GiB)", ylabel=loss_label(what))
    return _curves(axis, what.runs, points)


def _throughput(axis: Any, what: Comparison) -> int:
    drawn = _curves(axis, what.runs, throughput)
    axis.set(xlabel="step", ylabel="throughput (steps a second)", ylim=(0, None))
    return drawn


def _compression(axis: Any, what: Comparison) -> int:
    drawn = _curves(axis, what.runs, lambda run: run.series(f"{OURS}compression"))
    axis.set(xlabel="step", ylabel="compression (exact bytes / sent bytes)", ylim=(0, None))
    return drawn


def _errors(axis: Any, what: Comparison) -> int:
    """Bars: a group for each site, the mean over the run; a whisker from the smallest to the largest line."""
    sites = names(what.runs, f"{OURS}rel-error/")
    shown = [(index, run) for index, run in enumerate(what.runs) if names([run], f"{OURS}rel-error/")]
    for place, (index, run) in enumerate(shown):
        for column, name in enumerate(sites):
            _, values = run.series(name)
            if values:
                x, label = column + (place + 0.5) / len(shown) * 0.8 - 0.4, None if column else short(run.name)
                axis.bar(x, fmean(values), 0.7 / len(shown), color=style(index).colour, label=label)
                axis.vlines(x, min(values), max(values), color="grey", linewidth=1)
    axis.set(xlabel="kind of layer", ylabel="error of one rounding (norm / norm)")
    axis.set_xticks(range(len(sites)), [site(name).replace("-", "\n") for name in sites])
    return len(shown)


PLOTS = (
    Plot("loss", "Loss against step", _loss),
    Plot("loss-difference", "Loss difference to the baseline", _loss_difference),
    Plot("loss-bytes", "Loss against bytes moved", _loss_by_bytes),
    Plot("throughput", "Throughput", _throughput),
    Plot("compression", "Compression", _compression),
    Plot("error", "Error by site", _errors),
)


def draw(plot: Plot, what: Comparison, legend: bool) -> Any:
    """The figure, or None if no run has what it shows."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = 1 if max(len(run.name) for run in what.runs) > 24 else 2
    lines = math.ceil(len(what.runs) / columns) + 2 if legend else 0  # and the title
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.18 * lines), layout="constrained")
        axis = figure.add_subplot()
        axis.locator_params(nbins=6)
        if not plot.draw(axis, what):
            return None
        if legend:
            axis.set_title(plot.title)
            figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def svg(figure: Any, name: str) -> str:
    """The figure as one ``<svg>`` element for a page: no XML head, no fixed size, the page's text colour."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    head, _, body = text[text.index("<svg") :].partition(">")
    box = head[head.index('viewBox="') :].split('"')[1]
    return f'<svg viewBox="{box}" role="img" aria-label="{name}">' + body.replace(INK, "currentColor")


def png(figure: Any, path: Path) -> None:
    """The figure as a picture of 200 dots an inch on white."""
    figure.savefig(path, dpi=200)
