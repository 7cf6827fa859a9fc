"""Where we are: which of Megatron's linear layers is running, in forward and again in backward.

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

from .. import sampling
from ..config import Config, current
from ..patching import Seam

LAYERS = "megatron.core.tensor_parallel.layers"
LINEAR = "LinearWithGradAccumulationAndAsyncCommunication"

Function = Callable[..., Any]


class Site(NamedTuple):
    """The layer whose forward (or weight gradient) is running."""

    kind: str  # "row" or "column"
    module: nn.Module
    config: Config


class _Here(threading.local):
    site: Site | None = None


_here = _Here()
sampling.locate(lambda: _here.site.kind if _here.site else None)


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
        with at(None if _is_output_layer(self, weight) else site_of("column", self)):
            return original(self, input_, weight, *args, **kwargs)

    return forward


def _is_output_layer(module: Any, weight: Tensor | None) -> bool:
    """Only an output layer is handed its weight (the embedding's); Megatron marks the weight of one that owns it."""
    return weight is not None or getattr(module.weight, "is_embedding_or_output_parameter", False)


def _linear_forward(original: Function) -> Function:
    def forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        ctx.flash_comm_site = _here.site
        return original(ctx, *args, **kwargs)

    return forward


def _linear_backward(original: Function) -> Function:
    def backward(ctx: Any, *grads: Any) -> Any:
        with at(getattr(ctx, "flash_comm_site", None)):
            return original(ctx, *grads)

    return backward


ROWS = (
    Seam(LAYERS, "RowParallelLinear.forward", ("self", "input_"), _row_forward,
         "notes the row site; a method, so subclasses and instances made earlier find it at call time"),
    Seam(LAYERS, "ColumnParallelLinear.forward", ("self", "input_", "weight"), _column_forward,
         "notes the column site, and none for the output layer"),
    Seam(LAYERS, f"{LINEAR}.forward", ("ctx", "input", "weight"), _linear_forward,
         "keeps the site for backward; apply() looks forward up on the class at every call"),
    Seam(LAYERS, f"{LINEAR}.backward", ("ctx", "grad_output"), _linear_backward,
         "restores the site, so the second gather of the input equals the first; looked up on the class as well"),
)  # fmt: skip
