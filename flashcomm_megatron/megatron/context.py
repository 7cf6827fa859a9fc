"""Which of Megatron's linear layers this thread is running, and who is watching.

The idea
--------
Megatron's tensor-parallel layers look their collectives up in the globals of ``tensor_parallel/layers.py`` at every
call, so one binding there reaches every model, whatever was imported first. But the vocabulary-parallel embedding and
the output layer use the same names and must stay exact. So the layers' ``forward`` are wrapped: they only note the
*site*, that is, which layer is running. The collectives' replacements compress inside a site and call the original
everywhere else.

    row site      RowParallelLinear      all-reduce, or reduce-scatter under sequence parallelism
    column site   ColumnParallelLinear   all-gather of the input under sequence parallelism

No site: the output layer, expert layers (their token dispatcher communicates), and whatever is not a linear layer.

Backward runs on another thread, so the autograd function carries its site over: the input that a column layer gathers
a second time for its weight gradient must have the bits of the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..config import Config, current
from ..observe import location
from . import model
from .patching import Function


class Site(NamedTuple):
    """The layer whose forward (or weight gradient) is running."""

    kind: str  # "row" or "column"
    module: nn.Module
    config: Config

    @property
    def name(self) -> str:
        """The layer's name inside its model."""
        return model.name(self.module)


Observer = Callable[[nn.Module, Tensor, Any], None]  # (row layer, partial sum, group)
_observer: Observer | None = None


site: Callable[[], Site | None] = location.here  # the site this thread is at
at = location.at  # be at a site (None: at none) inside the block, on this thread


def site_of(kind: str, module: Any) -> Site | None:
    """The site that a layer is: None when flash-comm is off or the layer belongs to an expert."""
    config = current()
    return None if config is None or module.is_expert else Site(kind, module, config)


def observe(observer: Observer | None) -> None:
    """Show ``observer`` every partial sum at a row site and compress nothing, until called again with None."""
    global _observer
    _observer = observer


def observer() -> Observer | None:
    """Who is being shown partial sums."""
    return _observer


def keep_site(original: Function) -> Function:
    """Wrap an autograd function's forward; it may be called without a context where no gradient is recorded."""

    def forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        if ctx is not None:
            ctx.flash_comm_site = site()
        return original(ctx, *args, **kwargs)

    return forward


def restore_site(original: Function) -> Function:
    """Wrap an autograd function's backward, which runs at the site of its forward."""

    def backward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        with at(getattr(ctx, "flash_comm_site", None)):
            return original(ctx, *args, **kwargs)

    return backward
