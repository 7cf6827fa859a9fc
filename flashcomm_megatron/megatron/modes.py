"""Why nothing may be compressed here, whatever the collective: a mode of Megatron, or an argument we do not know.

**Batch-invariant mode** promises that a token's result does not depend on what else is in the batch, so that training
and inference agree bit for bit. A minimum size depends on the batch, and feedback is on in inference alone. There
everything is left to the original collectives, and counted.

**An unknown argument** of a newer Megatron or Transformer Engine: only the original knows what it means (patching.py).

Deterministic mode and CUDA graphs need no row here: whether and how a call is compressed follows from its shape, dtype
and configuration, so it is the same in every run, at capture and at replay.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..collectives import plan as policy
from ..observe import messages
from . import patching
from .context import Site

BATCH_INVARIANT = "batch-invariant mode"


def forbids(site: Site, collective: str, x: Tensor, group: Any, reason: str | None = None) -> bool:
    """Whether compression is forbidden at ``site``, for ``reason`` or another one; if so, the deferral is counted."""
    reason = reason or why_not(getattr(site.module, "config", None))
    if reason is None:
        return False
    messages.deferred(reason, policy.exact_bytes(collective, x.nbytes, group.size()), site.config)
    return True


def why_not(megatrons: Any) -> str | None:
    """Why nothing may be compressed in a model with this TransformerConfig, or in this call; None if it may."""
    if getattr(megatrons, "batch_invariant_mode", False):
        return BATCH_INVARIANT
    unknown = patching.unknown_argument()
    return None if unknown is None else f"argument {unknown}"
