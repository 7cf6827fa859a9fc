"""Collectives that carry tensor-parallel activations and are not compressed: counted by name, so that no gap is silent.

A counter changes nothing. Its module is waited for and never imported by us; a version without the name has no counter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..collectives.plan import exact_bytes
from ..config import current
from ..observe import messages
from . import context
from .patching import Function, Replace


def counter(reason: str, collective: str, only_at: str | None = None) -> Replace:
    """Make a factory of counters: every call is deferred for ``reason``; only at sites of one kind, if it is given."""

    def count(original: Function) -> Function:
        def counted(*args: Any, **kwargs: Any) -> Any:
            x, site, config = args[0] if args else kwargs.get("input_"), context.site(), current()
            is_there = only_at is None or (site is not None and site.kind == only_at)
            if config is not None and isinstance(x, Tensor) and is_there:
                from megatron.core.parallel_state import get_tensor_model_parallel_group

                world = (kwargs.get("group") or get_tensor_model_parallel_group()).size()
                if world > 1:
                    messages.deferred(reason, exact_bytes(collective, x.nbytes, world), config)
            return original(*args, **kwargs)

        return counted

    return count
