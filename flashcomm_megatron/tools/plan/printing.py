"""Numbers as people write them, rows as an aligned table, and the figure of --sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import PROJECTION


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Columns to the right, the first ``left`` to the left, two spaces between."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    form = "  ".join(f"{{:{'<' if i < left else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(form.format(*row).rstrip() for row in cells)


def time(seconds: float) -> str:
    """Three digits in the unit that suits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(nbytes: float) -> str:
    """Four digits in binary units."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.4g} {unit}"
    return f"{nbytes:.0f} B"


class Curve(NamedTuple):
    """One line of a panel."""

    name: str
    x: Sequence[float]
    y: list[float]

    @property
    def pays_from(self) -> float | None:
        """Of speed-ups: the least x from which on all are faster; None where that never begins."""
        slow = [i for i, gain in enumerate(self.y) if gain <= 1]
        first = slow[-1] + 1 if slow else 0
        return self.x[first] if first < len(self.x) else None


class Panel(NamedTuple):
    """One set of axes: of speed-ups, with a line where nothing is gained, or of seconds (``y`` says it)."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]


def draw(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Write the panels side by side; ValueError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"figures need matplotlib ({error}): pip install 'flashcomm_megatron[plots]'.") from None
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="tight")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=True):
        for curve in panel.curves:
            axis.plot(curve.x, curve.y, ".-", label=curve.name)
        axis.set_xscale("log", base=2)
        if panel.y == "seconds":
            axis.set_yscale("log")
        else:
            axis.axhline(1.0, color="black", lw=0.8)
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(f"{title}\n{PROJECTION}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
