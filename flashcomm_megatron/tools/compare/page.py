"""One HTML file with everything in it: figures, tables, notes. No script, no font, no picture is fetched.

One column on a phone, several on a wide screen; light or dark as the reader's system says. A table wider than the
screen scrolls by itself, with its labels in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from . import plots
from .headline import headline
from .runs import Run
from .table import Comparison, Row, final_rows

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d5d5d5; --faint: #666; --card: #fafafa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #151515; --line: #3a3a3a; --faint: #a0a0a0; --card: #1d1d1d } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem }
p { margin: .3rem 0; overflow-wrap: anywhere } .faint, small { color: var(--faint) }
.note { border-left: 4px solid #E69F00; padding-left: .7rem }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; margin: .6rem 0;
  position: sticky; top: 0; background: var(--paper); padding: .4rem 0; max-height: 30vh; overflow-y: auto }
.legend li { display: flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; min-width: 0 }
.legend svg { width: 2rem; height: .8rem; flex: none }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
figure { margin: 0; padding: .6rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px }
figcaption { font-weight: 600; margin-bottom: .3rem } figure svg { width: 100%; height: auto; display: block }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
tr:last-child > * { border-bottom: 0 }
tr:first-child th { white-space: normal; vertical-align: bottom; font-size: .9rem; min-width: 5.5rem }
th:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; position: sticky; left: 0;
  background: var(--card); min-width: 8rem; max-width: 16rem; font-weight: 500 }
td small { display: block }
"""


def page(what: Comparison, notes: Sequence[str]) -> str:
    """The document; ``notes`` are sentences for its top."""
    runs = what.runs
    count = f"{len(runs)} training run{'s' * (len(runs) != 1)}"
    against = f"Differences are to {runs[0].name}." if what.baseline else "No baseline: no differences are shown."
    first = headline(what) or count
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(f'flash-comm: {count}')}</title><style>{STYLE}</style></head><body>",
            f'<h1>{escape(first)}</h1><p class="faint">{count}. {escape(against)}</p>',
            *[f'<p class="note">{escape(note)}</p>' for note in notes],
            _legend(runs),
            '<div class="plots">',
            *[_figure(plot, what) for plot in plots.PLOTS],
            "</div>",
            "<h2>Final numbers</h2>",
            _table(runs, [(row.label, _cells(row)) for row in final_rows(what)]),
            "<h2>Settings</h2>",
            _table(runs, _settings(runs)),
            "</body></html>\n",
        ]
    )


def _legend(runs: Sequence[Run]) -> str:
    items = []
    for index, run in enumerate(runs):
        look = plots.style(index)
        colour = "currentColor" if look.colour == plots.INK else look.colour
        dash = {"-": "none", "--": "7 4", ":": "2 3", "-.": "7 3 2 3"}[look.dash]
        line = f'<line x1="0" y1="5" x2="32" y2="5" stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"/>'
        items.append(f'<li><svg viewBox="0 0 32 10" aria-hidden="true">{line}</svg>{escape(run.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _figure(plot: plots.Plot, what: Comparison) -> str:
    figure = plots.draw(plot, what, legend=False)
    body = plots.svg(figure, plot.name) if figure else '<p class="faint">None of these runs logged what this shows.</p>'
    return f'<figure id="{plot.name}"><figcaption>{plot.title}</figcaption>{body}</figure>'


def _table(runs: Sequence[Run], columns: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A row for each run; ``columns`` hold escaped HTML in their cells."""
    head = "".join(f"<th>{escape(label)}</th>" for label, _ in columns)
    body = "".join(
        f'<tr><th title="{escape(run.name)}">{escape(plots.short(run.name))}</th>'
        f"{''.join(f'<td>{cells[index]}</td>' for _, cells in columns)}</tr>"
        for index, run in enumerate(runs)
    )
    return f'<div class="scroll"><table><tr><th>run</th>{head}</tr>{body}</table></div>'


def _cells(row: Row) -> list[str]:
    return [
        number(value) + (f"<small>{difference:+.2%}</small>" if difference is not None else "")
        for value, difference in zip(row.values, row.differences, strict=True)
    ]


def number(value: float | None) -> str:
    """Four significant digits, whole numbers in full, a dash for none."""
    if value is None:
        return "\u2013"
    return f"{value:,.0f}" if math.isfinite(value) and value == int(value) else f"{value:,.4g}"


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """A column for each setting that some run has."""
    names = dict.fromkeys(name for run in runs for name, value in run.settings.items() if value is not None)
    values = [[run.settings.get(name) for run in runs] for name in names]
    cells = [["\u2013" if value is None else escape(str(value)) for value in column] for column in values]
    return list(zip(names, cells, strict=True))
