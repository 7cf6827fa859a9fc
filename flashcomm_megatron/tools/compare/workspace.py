"""The same comparison as a saved view of a W&B project, through the official ``wandb-workspaces`` package.

The view holds the panels of the page and pins the runs that were named, the baseline as W&B's own baseline. The runs
have to be in that project already: ``wandb sync FOLDER`` uploads an offline one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .headline import headline
from .plots import loss_label
from .runs import INSTALL_WANDB, OURS, CannotRead, Run, names
from .table import Comparison


def workspace(target: str, what: Comparison) -> Any:
    """The view, not saved yet; ``target`` is "entity/project". CannotRead if it cannot be made."""
    entity, _, project = target.partition("/")
    if not entity or not project or "/" in project:
        raise CannotRead(f"--wandb {target}: give entity/project.")
    try:
        from wandb_workspaces import workspaces as ws
        from wandb_workspaces.reports import v2 as wr
    except ImportError as error:
        raise CannotRead(f"--wandb needs wandb-workspaces ({error}). {INSTALL_WANDB}") from error
    ids = [_id(run) for run in what.runs]
    return ws.Workspace(
        entity=entity,
        project=project,
        name="flash-comm " + " / ".join(run.name for run in what.runs)[:100],
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in _sections(what, wr) if panels],
        runset_settings=ws.RunsetSettings(
            pinned_runs=ids[:20],  # W&B keeps no more
            baseline_run=ids[0] if what.baseline else None,
            pinned_columns=[f"summary:{OURS}compression", *([f"summary:{what.loss}"] if what.loss else [])],
        ),
    )


def _sections(what: Comparison, wr: Any) -> list[tuple[str, list[Any]]]:
    """The panels by question, each axis with its unit; the first panel is the headline in words."""
    loss, wire = what.loss, f"{OURS}wire-bytes"
    sites = names(what.runs, f"{OURS}rel-error/")

    def lines(title: str, y: list[str], unit: str, x: str = "Step", x_unit: str = "step") -> Any:
        return wr.LinePlot(title=title, x=x, y=y, title_x=x_unit, title_y=unit)

    quality = [
        *([wr.MarkdownPanel(markdown=f"**{sentence}**")] if (sentence := headline(what)) else []),
        *([lines("Loss against step", [loss], loss_label(what))] if loss else []),
        *([lines("Loss against bytes moved", [loss], loss_label(what), wire, "bytes sent by a rank")] if loss else []),
    ]
    moved = [
        lines("Bytes moved", [wire, f"{OURS}exact-bytes"], "bytes sent by a rank"),
        lines("Compression", [f"{OURS}compression"], "exact bytes / sent bytes"),
    ]
    errors = [
        *([lines("Error by site", sites, "relative error of one rounding")] if sites else []),
        wr.BarPlot(title="NaN blocks sampled", metrics=[f"{OURS}nan-blocks"], title_x="blocks"),
    ]
    return [
        ("flash-comm: quality", quality),
        ("flash-comm: bytes", moved),
        ("flash-comm: time", [lines("Seconds in collectives", [f"{OURS}seconds"], "seconds of the host")]),
        ("flash-comm: errors by kind of layer", errors),
        ("flash-comm: settings", [wr.RunComparer(diff_only="split")]),
    ]


def _id(run: Run) -> str:
    """What W&B calls the run: the last part of its path, or of the name of its file. CannotRead for other files."""
    if Path(run.source).is_file() and not run.source.endswith(".wandb"):
        raise CannotRead(f"--wandb: {run.source} is no W&B run: name runs of the project, or folders that you synced.")
    return run.source.rpartition("/")[2].removeprefix("run-").removesuffix(".wandb")
