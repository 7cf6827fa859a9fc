"""Rows as an aligned table, and numbers as people write them."""

from __future__ import annotations

from collections.abc import Sequence

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Columns to the right, the first ``left`` to the left, two spaces between."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(line))
        for line in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """The same for a document."""
    rule = ["---" if i < left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(header), rule, *map(list, rows)))


def time(seconds: float) -> str:
    """Three digits in the unit that suits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(nbytes: float) -> str:
    """Three digits in binary units."""
    for unit, factor in UNITS:
        if nbytes >= factor:
            return f"{nbytes / factor:.4g} {unit}"
    return f"{nbytes:.0f} B"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
