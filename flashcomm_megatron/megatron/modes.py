"""Modes of Megatron in which nothing may be compressed.

**Batch-invariant mode** promises that a token's result does not depend on what else is in the batch, so that training
and inference agree bit for bit. A size threshold depends on the batch, blocks may span two tokens, and feedback is on
in inference alone. There everything is left to the original collectives, and counted.

Deterministic mode and CUDA graphs need no row here: whether and how a call is compressed follows from its shape, dtype
and configuration (plan.py), so it is the same in every run, at capture and at replay.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..collectives.plan import exact_bytes
from ..observe import messages as announce
from .context import Site

BATCH_INVARIANT = "batch-invariant mode"


def forbids(site: Site, collective: str, x: Tensor, group: Any) -> bool:
    """Whether a mode of the layer's model forbids compression; if so, the deferral is counted."""
    if not getattr(getattr(site.module, "config", None), "batch_invariant_mode", False):
        return False
    announce.deferred(BATCH_INVARIANT, exact_bytes(collective, x.nbytes, group.size()), site.config)
    return True
