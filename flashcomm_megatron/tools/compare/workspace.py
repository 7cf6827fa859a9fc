"""The same comparison as a saved view of a W&B project, through the official ``wandb-workspaces`` package.

The view holds the panels of the page and pins the runs that were named, the baseline as W&B's own baseline. The runs
have to be in that project already: ``wandb sync FOLDER`` uploads an offline one.
"""

from __future__ import annotations

from typing import Any

from .runs import INSTALL_WANDB, OURS, CannotRead, Run
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
    runs, loss = what.runs, what.loss
    sites = sorted({name for run in runs for name in run.names(f"{OURS}rel-error/")})
    wire = f"{OURS}wire-bytes"
    panels = [
        *([wr.LinePlot(title="Loss against step", x="Step", y=[loss])] if loss else []),
        *([wr.LinePlot(title="Loss against bytes moved", x=wire, y=[loss])] if loss else []),
        wr.LinePlot(title="Bytes moved", x="Step", y=[wire, f"{OURS}exact-bytes"]),
        wr.LinePlot(title="Compression", x="Step", y=[f"{OURS}compression"]),
        wr.LinePlot(title="Seconds in collectives", x="Step", y=[f"{OURS}seconds"]),
        *([wr.LinePlot(title="Error by site", x="Step", y=list(sites))] if sites else []),
        wr.BarPlot(title="NaN blocks sampled", metrics=[f"{OURS}nan-blocks"]),
        wr.RunComparer(diff_only="split"),
    ]
    ids = [_id(run) for run in runs]
    return ws.Workspace(
        entity=entity,
        project=project,
        name="flash-comm " + " / ".join(run.name for run in runs)[:100],
        sections=[ws.Section(name="flash-comm", panels=panels, is_open=True)],
        runset_settings=ws.RunsetSettings(
            pinned_runs=ids[:20],  # W&B keeps no more
            baseline_run=ids[0] if what.baseline else None,
            pinned_columns=[f"summary:{OURS}compression", *([f"summary:{loss}"] if loss else [])],
        ),
    )


def _id(run: Run) -> str:
    """What W&B calls the run: the last part of its path, or of the name of its file."""
    return run.source.rpartition("/")[2].removeprefix("run-").removesuffix(".wandb")
