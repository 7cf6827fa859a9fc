"""Every Megatron name we replace, in one table, and what takes its place.

The idea
--------
Megatron's tensor-parallel layers resolve their collectives from the globals of ``tensor_parallel/layers.py`` at
every call, so one binding there reaches every model, whatever was imported first. But the vocabulary-parallel
embedding and the output layer use the same names and must stay exact. So the layers' ``forward`` are wrapped as
well: they only note the *site*, that is, which layer is running, and the collectives' replacements compress inside
a site and are the original everywhere else.

    row site      RowParallelLinear      all-reduce, or reduce-scatter under sequence parallelism
    column site   ColumnParallelLinear   all-gather of the input under sequence parallelism

No site: the output layer, expert layers (their token dispatcher communicates), and whatever is not a linear layer.

Gradients are those of the exact collective. Backward communication stays exact with one exception: the input that
a column layer gathers a second time for its weight gradient must have the bits of the first time, so the autograd
function carries its site from forward to backward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn

from . import announce, collectives, environment, feedback, patching, sampling, sites, training_log
from .algorithms import Residuals
from .config import Config, current
from .patching import PatchError, Seam
from .recipes import Legs

OLDEST = (0, 13)  # megatron-core; the first whose layers hand their process group to every collective
LAYERS = "megatron.core.tensor_parallel.layers"

Function = Callable[..., Any]


class Site(NamedTuple):
    """The layer whose forward (or weight gradient) is running."""

    kind: str  # "row" or "column"
    module: nn.Module
    config: Config


class Call(NamedTuple):
    """How a collective at a site is compressed: by the configuration, or by the site's own codecs."""

    config: Config
    legs: Legs | None = None
    residuals: Residuals | None = None  # what this rank's roundings lost at the layers before


Observer = Callable[[nn.Module, Tensor, Any], None]  # (row layer, partial sum, group)


class _Here(threading.local):
    site: Site | None = None


_here = _Here()
_observer: Observer | None = None
sampling.locate(lambda: _here.site.kind if _here.site else None)


def _site(kind: str, module: Any) -> Site | None:
    config = current()
    return None if config is None or module.is_expert else Site(kind, module, config)


# ---- where we are -----------------------------------------------------------------------------------------------


def _row_forward(original: Function) -> Function:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer, _here.site = _here.site, _site("row", self)
        try:
            return original(self, *args, **kwargs)
        finally:
            _here.site = outer

    return forward


def _column_forward(original: Function) -> Function:
    def forward(self: Any, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        outer, _here.site = _here.site, None if _is_output_layer(self, weight) else _site("column", self)
        try:
            return original(self, input_, weight, *args, **kwargs)
        finally:
            _here.site = outer

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
        outer, _here.site = _here.site, getattr(ctx, "flash_comm_site", None)
        try:
            return original(ctx, *grads)
        finally:
            _here.site = outer

    return backward


# ---- what is sent -----------------------------------------------------------------------------------------------


def _reduce(original: Function) -> Function:
    def reduce_from_tensor_model_parallel_region(input_: Tensor, group: Any = None) -> Any:
        call = _wanted("row", "all_reduce", input_, group)
        return _run(_AllReduce, input_, group, call) if call else original(input_, group)

    return reduce_from_tensor_model_parallel_region


def _reduce_scatter(original: Function) -> Function:
    def reduce_scatter_to_sequence_parallel_region(input_: Tensor, group: Any = None, *args: Any, **kwargs: Any) -> Any:
        plain = not args and not kwargs  # neither uneven splits nor a shared output buffer
        call = _wanted("row", "reduce_scatter", input_, group) if plain else None
        return _run(_ReduceScatter, input_, group, call) if call else original(input_, group, *args, **kwargs)

    return reduce_scatter_to_sequence_parallel_region


def _gather(original: Function) -> Function:
    def gather_from_sequence_parallel_region(
        input_: Tensor, tensor_parallel_output_grad: bool = True, group: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        plain = tensor_parallel_output_grad and not args and not kwargs
        call = _wanted("column", "all_gather", input_, group) if plain else None
        if call:
            return _run(_AllGather, input_, group, call)
        return original(input_, tensor_parallel_output_grad, group, *args, **kwargs)

    return gather_from_sequence_parallel_region


def _gather_tensor(original: Function) -> Function:
    def all_gather_into_tensor(
        output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        call = _wanted("column", "all_gather", input_tensor, group)
        if not call:
            return original(output_tensor, input_tensor, group=group, async_op=async_op)
        handle = collectives.all_gather(input_tensor, group, call.config, async_op=async_op, out=output_tensor)
        return handle if async_op else None

    return all_gather_into_tensor


def observe(observer: Observer | None) -> None:
    """Show ``observer`` every partial sum at a row site and compress nothing, until called again with None."""
    global _observer
    _observer = observer


def _wanted(kind: str, collective: str, x: Tensor, group: Any) -> Call | None:
    """How to compress, or None: not inside a site of this kind, deferred and counted, or only observed."""
    site = _here.site
    if site is None or site.kind != kind or group is None:
        return None
    if _observer is not None:
        if kind == "row":
            _observer(site.module, x, group)
        return None
    legs = sites.legs(site.config, site.module, group) if kind == "row" else None
    if not collectives.wants(collective, x, group, site.config, legs):
        return None
    row = kind == "row"  # asked here: inside an autograd function gradients look switched off
    return Call(site.config, legs, feedback.residuals(site.module, x, group, site.config) if row else None)


def _run(function: type[torch.autograd.Function], x: Tensor, group: Any, call: Call) -> Any:
    return function.apply(x, group, call)  # type: ignore[no-untyped-call]


class _AllReduce(torch.autograd.Function):
    """Sum over ranks; the gradient of a sum that every rank holds is the gradient itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, call: Call) -> Any:
        return collectives.all_reduce(x, group, call.config, legs=call.legs, residuals=call.residuals)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


class _ReduceScatter(torch.autograd.Function):
    """Sum over ranks, cut along the first dimension; the gradient is gathered, exactly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, call: Call) -> Any:
        ctx.group = group
        return collectives.reduce_scatter(x, group, call.config, legs=call.legs, residuals=call.residuals)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _mappings().gather_from_sequence_parallel_region(grads[0], group=ctx.group), None, None


class _AllGather(torch.autograd.Function):
    """Concatenate along the first dimension; the gradients are summed and cut, exactly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, call: Call) -> Any:
        ctx.group = group
        return collectives.all_gather(x, group, call.config)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _mappings().reduce_scatter_to_sequence_parallel_region(grads[0], group=ctx.group), None, None


def _mappings() -> Any:
    from megatron.core.tensor_parallel import mappings

    return mappings


# ---- the table --------------------------------------------------------------------------------------------------

LINEAR = "LinearWithGradAccumulationAndAsyncCommunication"
SEAMS = (
    Seam(LAYERS, "RowParallelLinear.forward", ("self", "input_"), _row_forward,
         "notes the row site; a method, so subclasses and instances made earlier find it at call time"),
    Seam(LAYERS, "ColumnParallelLinear.forward", ("self", "input_", "weight"), _column_forward,
         "notes the column site, and none for the output layer"),
    Seam(LAYERS, f"{LINEAR}.forward", ("ctx", "input", "weight"), _linear_forward,
         "keeps the site for backward; apply() looks forward up on the class at every call"),
    Seam(LAYERS, f"{LINEAR}.backward", ("ctx", "grad_output"), _linear_backward,
         "restores the site, so the second gather of the input equals the first; looked up on the class as well"),
    Seam(LAYERS, "reduce_from_tensor_model_parallel_region", ("input_", "group"), _reduce,
         "row all-reduce; layers.py's own binding, so routers and token counts, which hold others, are not reached"),
    Seam(LAYERS, "reduce_scatter_to_sequence_parallel_region", ("input_", "group"), _reduce_scatter,
         "row reduce-scatter under sequence parallelism; layers.py's own binding"),
    Seam(LAYERS, "gather_from_sequence_parallel_region", ("input_", "tensor_parallel_output_grad", "group"), _gather,
         "column all-gather under sequence parallelism when the weight is frozen; layers.py's own binding"),
    Seam(LAYERS, "dist_all_gather_func", ("output_tensor", "input_tensor", "group", "async_op"), _gather_tensor,
         "column all-gather under sequence parallelism, forward and again for the weight gradient"),
)  # fmt: skip


def install() -> None:
    """Replace every name of the table and announce it at the next forward. Idempotent.

    Raises PatchError if Megatron is missing, too old, or does not fit; ValueError for an unknown environment variable.
    """
    environment.check()
    if environment.is_disabled():
        announce.say("flash-comm: off, because FLASH_COMM_DISABLE is set.")
        return
    version = megatron_version()
    if Version(version).release < OLDEST:
        raise PatchError(
            f"flash-comm needs megatron-core >= 0.13 (found {version}): "
            "before 0.13 tensor_parallel.mappings._reduce takes no group."
        )
    patching.apply(SEAMS)
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    training_log.install()
    announce.start(f"{len(SEAMS)} names patched in megatron-core {version}", RowParallelLinear)


def uninstall() -> None:
    """Restore every object; PatchError if somebody patched over one of them since."""
    patching.revert(SEAMS)
    training_log.uninstall()
    announce.stop()


def megatron_version() -> str:
    """Version of the megatron-core that imports; PatchError with the reason if none does."""
    try:
        import megatron.core
    except ImportError as error:
        raise PatchError(f"flash-comm needs megatron-core >= 0.13, which cannot be imported: {error}.") from error
    return str(megatron.core.__version__)
