"""Figures of the sweeps. Each says that it is a projection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import PROJECTION
from .sweep import Line


class Panel(NamedTuple):
    """One set of axes; ``even``: the height where nothing is gained, if there is one."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    even: float | None = 1.0
    log: bool = False


def draw(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Write the panels, two in a row or all of an odd number; ValueError if matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ValueError(f"figures need matplotlib ({error}): pip install 'flashcomm_megatron[plots]'.") from None
    columns = 2 if len(panels) % 2 == 0 else len(panels)
    rows = len(panels) // columns
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 4.2 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=True):
        _panel(axis, panel)
    figure.suptitle(f"{title}\n{PROJECTION}", fontsize="medium")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, panel: Panel) -> None:
    for line in panel.lines:
        axis.plot(line.x, line.y, ".-", label=line.name)
    if panel.even is not None:
        axis.axhline(panel.even, color="black", lw=0.8)
    axis.set_xscale("log", base=2)
    if panel.log:
        axis.set_yscale("log")
    axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
