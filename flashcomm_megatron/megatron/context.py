"""Where we are: which of Megatron's linear layers is running, and who is watching.

The idea
--------
Megatron's tensor-parallel layers resolve their collectives from the globals of ``tensor_parallel/layers.py`` at
every call, so one binding there reaches every model, whatever was imported first. But the vocabulary-parallel
embedding and the output layer use the same names and must stay exact. So the layers' ``forward`` are wrapped: they
only note the *site*, that is, which layer is running, and the collectives' replacements (the other tables of this
folder) compress inside a site and are the original everywhere else.

    row site      RowParallelLinear      all-reduce, or reduce-scatter under sequence parallelism
    column site   ColumnParallelLinear   all-gather of the input under sequence parallelism

No site: the output layer, expert layers (their token dispatcher communicates), and whatever is not a linear layer.

Backward runs on another thread, so the autograd function carries its site over: the input that a column layer gathers
a second time for its weight gradient must have the bits of the first time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..config import Config, current
from . import sites
from .patching import Seam

LAYERS = "megatron.core.tensor_parallel.layers"

Function = Callable[..., Any]


class Site(NamedTuple):
    """The layer whose forward (or weight gradient) is running."""

    kind: str  # "row" or "column"
    module: nn.Module
    config: Config

    def name(self) -> str:
        """The layer's name inside its model."""
        return sites.name(self.module)


Observer = Callable[[nn.Module, Tensor, Any], None]  # (row layer, partial sum, group)


class _Here(threading.local):
    site: Site | None = None


_here = _Here()
_observer: Observer | None = None


def site() -> Site | None:
    """The site this thread is at."""
    return _here.site


@contextmanager
def at(site: Site | None) -> Iterator[None]:
    """Be at ``site`` (None: at no site) inside the block, on this thread."""
    outer, _here.site = _here.site, site
    try:
        yield
    finally:
        _here.site = outer


def observe(observer: Observer | None) -> None:
    """Show ``observer`` every partial sum at a row site and compress nothing, until called again with None."""
    global _observer
    _observer = observer


def observer() -> Observer | None:
    """Who is being shown partial sums."""
    return _observer


def site_of(kind: str, module: Any) -> Site | None:
    """The site that a layer is: None when flash-comm is off or the layer belongs to an expert."""
    config = current()
    return None if config is None or module.is_expert else Site(kind, module, config)


def _row_forward(original: Function) -> Function:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with at(site_of("row", self)):
            return original(self, *args, **kwargs)

    return forward


def _column_forward(original: Function) -> Function:
    def forward(self: Any, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        with at(None if is_output_layer(self, weight) else site_of("column", self)):
            return original(self, input_, weight, *args, **kwargs)

    return forward


def is_output_layer(module: Any, weight: Tensor | None) -> bool:
    """Only an output layer is handed its weight (the embedding's); Megatron marks the weight of one that owns it."""
    own = getattr(module, "weight", None)
    return weight is not None or getattr(own, "is_embedding_or_output_parameter", False)


def keep_site(original: Function) -> Function:
    """Wrap an autograd function's forward; it may be called without a context where no gradient is recorded."""

    def forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        if ctx is not None:
            ctx.flash_comm_site = _here.site
        return original(ctx, *args, **kwargs)

    return forward


def restore_site(original: Function) -> Function:
    """Wrap an autograd function's backward, which runs at the site of its forward."""

    def backward(ctx: Any, *grads: Any) -> Any:
        with at(getattr(ctx, "flash_comm_site", None)):
            return original(ctx, *grads)

    return backward


ROWS = (
    Seam(LAYERS, "RowParallelLinear.forward", ("self", "input_"), _row_forward,
         "notes the row site; a method, so subclasses and instances made earlier find it at call time",
         is_layer=True),
    Seam(LAYERS, "ColumnParallelLinear.forward", ("self", "input_", "weight"), _column_forward,
         "notes the column site, and none for the output layer",
         is_layer=True),
)  # fmt: skip
