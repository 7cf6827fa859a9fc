"""What a mode of Megatron, or an argument we do not know, changes about compression, whatever the collective.

**Batch-invariant mode** promises that a token's result does not depend on what else is in the batch, so that training
and inference agree bit for bit. Rows stand alone in every codec, so compression stays on; but no minimum size is asked
for, since it depends on the batch, and there is no feedback, which is on in inference alone.

**An unknown argument** of a newer Megatron or Transformer Engine: only the original knows what it means (patching.py).

Deterministic mode and CUDA graphs need no row here: whether and how a call is compressed follows from its shape, dtype
and configuration, so it is the same in every run, at capture and at replay.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..collectives.plan import exact_bytes
from ..observe import messages
from . import patching
from .context import Site

BATCH_INVARIANT = "batch-invariant mode"


def forbids(site: Site, collective: str, x: Tensor, group: Any, reason: str | None = None) -> bool:
    """Whether compression is forbidden at ``site``, for ``reason`` or another one; if so, the deferral is counted."""
    if collective == "reduce_scatter" and (x.dim() == 0 or x.size(0) % group.size()):
        return True  # a mistake of the caller's: the original says so, whatever the size
    reason = reason or why_not()
    if reason is None:
        return False
    messages.deferred(reason, exact_bytes(collective, x.nbytes, group.size()), site.config)
    return True


def is_batch_invariant(owner: Any) -> bool:
    """Whether a module or dispatcher belongs to a model in Megatron's batch-invariant mode."""
    return bool(getattr(getattr(owner, "config", None), "batch_invariant_mode", False))


def why_not() -> str | None:
    """Why nothing may be compressed in this call; None if it may."""
    unknown = patching.unknown_argument()
    return None if unknown is None else f"argument {unknown}"
