"""Megatron's own log line, once per interval, with our scalars beside it.

``megatron.training.training.training_log`` runs after every iteration on every rank and is resolved in its module at
the call. It is wrapped when flash-comm is on and as soon as the script imports that module. The step is looked up by
name, for its position moved between versions. Megatron's W&B lines depend on ``--tensorboard-dir``; ours do not, so
they carry the losses too, under Megatron's names.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..config import current
from ..observe.metrics import is_last_rank, metrics, number, send, to_tensorboard
from . import patching
from .patching import Function, PatchError, Seam
from .when_imported import when_imported

TRAINING = "megatron.training.training"
USED = ("loss_dict", "iteration")


def _training_log(original: Function) -> Function:
    signature = inspect.signature(original)
    missing = [name for name in USED if name not in signature.parameters]
    if missing:
        raise PatchError(f"expected a parameter {missing[0]}, found ({', '.join(signature.parameters)})")

    def training_log(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        _log(given["iteration"], given["loss_dict"])
        return result

    return training_log


def _log(step: int, losses: Mapping[str, Any]) -> None:
    from megatron.training import global_vars

    config = current()
    if config is None or step % (config.log_interval or global_vars.get_args().log_interval):
        return
    wandb, tensorboard = global_vars.get_wandb_writer(), global_vars.get_tensorboard_writer()
    if wandb is None and tensorboard is None and not (config.metrics and is_last_rank()):
        return
    ours = metrics()
    send(step, ours, {name: number(value) for name, value in losses.items()}, wandb)
    if tensorboard is not None:
        to_tensorboard(tensorboard, step, ours)


SEAM = Seam(TRAINING, "training_log", USED[:1], _training_log,
            "logs our scalars after Megatron's own; train() looks it up at every iteration")  # fmt: skip

_wanted = False


def install() -> None:
    """Wrap training_log as soon as the script imports it; at once if it has."""
    global _wanted
    _wanted = True
    when_imported(TRAINING, _patch)


def uninstall() -> None:
    """Restore it."""
    global _wanted
    _wanted = False
    patching.revert([SEAM])


def _patch() -> None:
    if _wanted:
        patching.apply_late(SEAM, "call flashcomm_megatron.log_metrics(step) in the script.")
