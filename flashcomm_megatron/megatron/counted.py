"""Collectives that carry tensor-parallel activations and are not compressed: counted by name, so that no gap is silent.

A counter changes nothing. Its module is waited for and never imported by us; a version without the name has no counter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..collectives.plan import exact_bytes
from ..config import current
from ..observe import messages
from . import context
from .patching import Function


def counter(reason: str, collective: str, only_at: str | None = None) -> Callable[[Function], Function]:
    """Make a factory of counters: every call is deferred for ``reason``; only at sites of one kind, if it is given."""

    def count(original: Function) -> Function:
        def counted(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs.get("input_")
            if isinstance(x, Tensor) and (only_at is None or _is_at(only_at)):
                _count(reason, collective, x, kwargs.get("group"))
            return original(*args, **kwargs)

        return counted

    return count


def _is_at(kind: str) -> bool:
    site = context.site()
    return site is not None and site.kind == kind


def _count(reason: str, collective: str, x: Tensor, group: Any) -> None:
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    config = current()
    world = (group or get_tensor_model_parallel_group()).size()
    if config is not None and world > 1:
        messages.deferred(reason, exact_bytes(collective, x.nbytes, world), config)
