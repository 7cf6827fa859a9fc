"""Loss of perplexity against bits on the wire, one panel for each number of ranks, with the front no recipe beats."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .score import Score

LEAST = 1e-5  # rises at or below, negative ones among them, are drawn here


def draw(scores: Iterable[Score], path: Path) -> bool:
    """Write the plot; False if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    worlds: dict[int, list[Score]] = {}
    for score in scores:
        if score.tp > 1:
            worlds.setdefault(score.tp, []).append(score)
    if not worlds:
        return True
    figure = Figure(figsize=(5 * len(worlds), 4.5), layout="tight")
    axes = figure.subplots(1, len(worlds), sharey=True, squeeze=False)[0]
    for axis, (world, rows) in zip(axes, sorted(worlds.items()), strict=True):
        for recipe in dict.fromkeys(row.recipe for row in rows):
            axis.plot(*_points([row for row in rows if row.recipe == recipe]), "o", label=recipe)
        axis.plot(*_points(front(rows)), "k--", lw=1, label="front")
        axis.set(title=f"TP{world}", xlabel="bits per value on the wire", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_ylabel("relative rise of perplexity")
    figure.savefig(path, dpi=120)
    return True


def front(scores: list[Score]) -> list[Score]:
    """Those that no other beats in both bits and rise, by bits."""
    best: list[Score] = []
    for score in sorted(scores, key=lambda each: (each.wire_bits, each.rise)):
        if not best or score.rise < best[-1].rise:
            best.append(score)
    return best


def _points(scores: list[Score]) -> tuple[list[float], list[float]]:
    return [score.wire_bits for score in scores], [max(score.rise, LEAST) for score in scores]
