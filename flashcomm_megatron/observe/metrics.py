"""Counters and sampled errors as ``flash-comm/*`` scalars, in whatever the run already writes to.

:func:`metrics` is the dictionary; :func:`log_metrics` hands it on, at the run's own step, to the active Weights &
Biases run, to a TensorBoard writer and to a JSON-lines file (``--flash-comm-metrics FILE``). A Megatron script needs
neither: its ``training_log`` is wrapped (training_log.py), once per log interval.

Counters are totals of this rank since the start: they may miss a line and still be right at the next. Errors are of
what was sampled since the last call (error_sampling.py); to read them is the only wait for the device.
The first line of the JSON file, and the entry ``flash-comm`` of the W&B run's config, say how the run was configured.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..codec import native
from ..config import Config, current
from ..version import __version__
from . import error_sampling, messages
from .counters import stats

logger = logging.getLogger("flashcomm_megatron")
PREFIX = "flash-comm/"

_described: set[str] = set()  # files and W&B runs that have our settings
_failed: set[int] = set()  # modules and runs of W&B that took no metrics


def metrics() -> dict[str, float]:
    """The ``flash-comm/*`` scalars of this rank, to log with any tool; waits for the device once for each site.

    Bytes, calls and seconds count from the start (or the last reset_stats()); errors from the last call of metrics().
    """
    counted = stats()
    scalars: dict[str, float] = {
        "wire-bytes": counted["wire_bytes"],
        "exact-bytes": counted["exact_bytes"],
        "compression": counted["exact_bytes"] / counted["wire_bytes"] if counted["wire_bytes"] else 1.0,
        "quantized-calls": counted["quantized"],
        "deferred-calls": sum(counted["deferred"].values()),
        "seconds": counted["seconds"],
    }
    for reason, calls in counted["deferred"].items():
        scalars[f"deferred-calls/{reason.replace(' ', '-')}"] = calls
    errors = error_sampling.read()
    for site, error in errors.items():
        scalars[f"rel-error/{site}"] = error.relative
        if error.relative:
            scalars[f"snr-db/{site}"] = -20 * math.log10(error.relative)
    scalars["nan-blocks"] = sum(error.nan_blocks for error in errors.values())
    return {PREFIX + name: value for name, value in scalars.items()}


def log_metrics(step: int, scalars: Mapping[str, Any] | None = None, writer: Any = None) -> dict[str, float]:
    """Log :func:`metrics` and your own ``scalars`` (the loss, say) at ``step``; returns what was logged.

    Goes to the active ``wandb`` run of this process, to ``writer`` (a TensorBoard SummaryWriter) and, on the last rank,
    to the JSON-lines file of the configuration. With ``log_interval``, steps that it does not divide are passed over.
    """
    config = current()
    if config is not None and config.log_interval and step % config.log_interval:
        return {}
    run = sys.modules.get("wandb")
    ours, others = metrics(), {name: number(value) for name, value in (scalars or {}).items()}
    send(step, ours, others, run if getattr(run, "run", None) is not None else None)
    if writer is not None:
        to_tensorboard(writer, step, ours | others)
    return ours | others


def send(step: int, ours: Mapping[str, float], others: Mapping[str, float], wandb: Any) -> None:
    """One line for W&B (the module or a run; None for neither) and one for the JSON-lines file."""
    config = current()
    if wandb is not None:
        try:
            run = str(getattr(getattr(wandb, "run", wandb), "id", ""))
            if run not in _described:
                _described.add(run)
                wandb.config.update({"flash-comm": settings(config)}, allow_val_change=True)
            wandb.log({**others, **ours}, step)
        except Exception as error:  # a run that is finished, a wandb that is half imported: never a training step's end
            if id(wandb) not in _failed:
                logger.warning("flash-comm: no metrics reach W&B: %r", error)
            _failed.add(id(wandb))
    if config is not None and config.metrics and is_last_rank():
        _append(config, {"step": step, "time": time.time(), **others, **ours})


def to_tensorboard(writer: Any, step: int, scalars: Mapping[str, float]) -> None:
    """One scalar each."""
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)


def settings(config: Config | None = None) -> dict[str, Any]:
    """What makes runs comparable: the options in force, the codecs' blocks, versions and the commit if it is known."""
    config = config or current()
    options = asdict(config) | {"block": config.legs.reduce.block} if config else {}
    try:
        megatron = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        megatron = None
    return options | {
        "version": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "megatron-core": megatron,
        "extension": native.describe(),
        "ranks": torch.distributed.get_world_size() if _has_ranks() else 1,
    }


def is_last_rank() -> bool:
    """The rank that writes, which is where Megatron has its writers and the loss."""
    return not _has_ranks() or torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _append(config: Config, line: dict[str, Any]) -> None:
    """Append a line, the settings before the first; a file that cannot be written is reported once, never fatal."""
    path = Path(str(config.metrics))
    first = [] if str(path) in _described else [{"config": {"flash-comm": settings(config)}, "time": line["time"]}]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.seek(max(0, file.seek(0, 2) - 1))
            torn = file.read() not in (b"", b"\n")  # what wrote before us died within its last line
            rows = "".join(json.dumps(row) + "\n" for row in [*first, line])
            file.write(("\n" * torn + rows).encode())
    except OSError as error:
        if first:
            what = f"no metrics are written: {error}. Give --flash-comm-metrics another path."
            messages.fails_at_the_end(what, config)
    _described.add(str(path))


def number(value: Any) -> float:
    """A Python number, or a tensor's mean."""
    return float(value.float().mean()) if isinstance(value, torch.Tensor) else float(value)


def _has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _commit() -> str | None:
    """The commit pip installed from, else that of the checkout this file lies in."""
    try:
        origin = json.loads(metadata.distribution("flashcomm_megatron").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {}
    root = Path(__file__).resolve().parent.parent
    if "vcs_info" in origin or not (root / ".git").exists():
        return str(origin["vcs_info"]["commit_id"]) if "vcs_info" in origin else None
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
