"""Loss of perplexity against bits on the wire, one panel for each number of ranks, with the front no recipe beats."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .score import Score

LEAST = 1e-5  # rises at or below, negative ones among them, are drawn here


def draw(scores: Iterable[Score], path: Path) -> bool:
    """Write the plot; False if matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        return False
    worlds: dict[int, list[Score]] = {}
    for score in scores:
        if score.tp > 1:
            worlds.setdefault(score.tp, []).append(score)
    if not worlds:
        return True
    figure, axes = plt.subplots(1, len(worlds), figsize=(5 * len(worlds), 4.5), sharey=True, squeeze=False)
    for axis, (world, rows) in zip(axes[0], sorted(worlds.items()), strict=True):
        _panel(axis, world, rows)
    axes[0][0].set_ylabel("relative rise of perplexity")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def front(scores: list[Score]) -> list[Score]:
    """Those that no other beats in both bits and rise, by bits."""
    best: list[Score] = []
    for score in sorted(scores, key=lambda each: (each.wire_bits, each.rise)):
        if not best or score.rise < best[-1].rise:
            best.append(score)
    return best


def _panel(axis: Any, world: int, scores: list[Score]) -> None:
    for recipe in dict.fromkeys(score.recipe for score in scores):
        rows = sorted((score for score in scores if score.recipe == recipe), key=lambda each: each.wire_bits)
        axis.plot([each.wire_bits for each in rows], [max(each.rise, LEAST) for each in rows], "o", label=recipe)
    best = front(scores)
    axis.plot([each.wire_bits for each in best], [max(each.rise, LEAST) for each in best], "k--", lw=1, label="front")
    axis.set(title=f"TP{world}", xlabel="bits per value on the wire", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
