"""The command line of compare: read every run, say what could not be read, write what can be compared."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .runs import CannotRead, Run, names, read

EXPLAIN = (
    "A RUN is a JSON-lines file, the folder of a local W&B run, or a W&B run path (entity/project/run). "
    "Example: python -m flashcomm_megatron compare exact.jsonl flash-4.jsonl --out compare.html"
)


def main(argv: list[str]) -> int:
    """Exit code: 0 when everything asked for is there, 1 when something is missing, 2 when nothing was written."""
    options = _parser().parse_args(argv)
    runs, notes = _read_all(options.runs)
    baseline = _baseline(options.baseline, options.runs, runs, notes)
    unread = len(notes)
    if not runs:
        return _say(notes, 2)
    ordered = list(runs.values())
    if baseline is not None:
        ordered = [baseline, *(run for run in ordered if run is not baseline)]
    notes += [note for run in ordered for note in run.notes] + _lengths(ordered)
    try:
        _write(ordered, baseline, options, notes)
    except CannotRead as error:
        return _say([*notes, str(error)], 2)
    return _say(notes, 1 if unread else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flashcomm_megatron compare", description="Compare training runs.", epilog=EXPLAIN
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="A run; the first is the baseline unless told otherwise.")
    add("--baseline", metavar="RUN", help="The run that differences are taken to.")
    add("--loss", metavar="NAME", help="The scalar to compare. Default: the training loss.")
    add("--out", metavar="FILE", type=Path, default=Path("compare.html"), help="The page. Default: %(default)s")
    add("--png", action="store_true", help="Also write each figure as FILE's name with -loss.png and so on.")
    add("--wandb", metavar="PROJECT", help="Also save a workspace in this W&B project (entity/project).")
    return parser


def _read_all(sources: Sequence[str]) -> tuple[dict[str, Run], list[str]]:
    """Runs by source, in order, those of one name called by their sources; a sentence for each that cannot be read."""
    runs, notes = {}, []
    for source in dict.fromkeys(sources):
        try:
            runs[source] = read(source)
        except CannotRead as error:
            notes.append(str(error))
    count = Counter(run.name for run in runs.values())
    return {source: replace(run, name=source) if count[run.name] > 1 else run for source, run in runs.items()}, notes


def _baseline(wanted: str | None, sources: Sequence[str], runs: dict[str, Run], notes: list[str]) -> Run | None:
    """The baseline, read and added if it is none of the runs; None, with a note, if there is none."""
    source = wanted or sources[0]
    found = runs.get(source) or next((run for run in runs.values() if run.name == source), None)
    if found is not None:
        return found
    if wanted is not None and wanted not in sources:
        try:
            runs[wanted] = read(wanted)
            return runs[wanted]
        except CannotRead as error:
            notes.append(f"baseline {error}")
    notes.append(
        f"No baseline, so no differences: choose one with --baseline, from {', '.join(runs) or 'runs that exist'}."
    )
    return None


def _lengths(runs: Sequence[Run]) -> list[str]:
    from .table import common_step, ended_early, last_step

    early, step = ended_early(runs), common_step(runs)
    notes = [
        f"{run.name} ended early (crashed?): its numbers stand at step {last_step(run):.0f}, its last, and its "
        "differences are to the baseline there."
        for run in early
    ]
    whole = [run for run in runs if run not in early]
    if len({last_step(run) for run in whole}) > 1:
        first = min(whole, key=last_step)
        notes.append(f"The runs have different lengths: numbers are taken at step {step:.0f}, where {first.name} ends.")
    return notes


def _write(runs: Sequence[Run], baseline: Run | None, options: argparse.Namespace, notes: list[str]) -> None:
    from . import page, plots, table, workspace
    from .headline import headline

    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CannotRead(f"figures need matplotlib ({error}). Run pip install 'flashcomm_megatron[plots]'.") from error
    loss = options.loss or table.loss_name(runs)
    known = names(runs)
    if loss not in known:
        notes.append(
            f"No run logged a loss{f' {loss!r}' if loss else ''}: name a scalar with --loss, from {', '.join(known)}."
        )
    what = table.Comparison(runs, baseline, loss)
    view = workspace.workspace(options.wandb, what) if options.wandb else None
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page.page(what, notes), encoding="utf-8")
    if sentence := headline(what):
        print(sentence)
    print(f"wrote {options.out}")
    for plot in plots.PLOTS if options.png else ():
        figure = plots.draw(plot, what, legend=True)
        if figure:
            path = options.out.with_name(f"{options.out.stem}-{plot.name}.png")
            plots.png(figure, path)
            print(f"wrote {path}")
    if view is not None:
        print(f"saved {view.save().url}")


def _say(notes: Sequence[str], code: int) -> int:
    for note in notes:
        print(f"compare: {note}", file=sys.stderr)
    return code
