"""Transformer Engine's layers, Megatron's default: where we are, and what they send.

Megatron's ``TELinear`` and ``TELayerNormColumnParallelLinear`` are classes of Transformer Engine with a ``forward`` of
Megatron's around theirs; that one notes the site. Communication happens inside, in functions that Transformer Engine's
modules resolve from their own globals at every call, and those are replaced:

    row site      module/linear.py              allreduce, reduce_scatter_along_first_dim
    column site   module/linear.py              gather_along_first_dim, forward and again for the weight gradient
    column site   module/layernorm_linear.py    the same

They run inside an autograd function of Transformer Engine, so no gradient is recorded here; the same functions, called
in backward, send gradients, which are compressed as gradients.py says:

    column site   both files                    allreduce, reduce_scatter_along_first_dim, asynchronous
    row site      module/base.py                gather_along_first_dim

Left alone and counted with the reason: what travels in FP8; and what a layer communicates by other means, that is,
user buffers overlapped with the matrix product and all-reduces over symmetric memory. ``LayerNormMLP`` and the
operations behind ``--use-transformer-engine-op-fuser`` are no sites.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from ..collectives.plan import exact_bytes
from ..config import current
from ..observe import messages
from . import context, differentiable, feedback, gradients, model
from .context import Site
from .patching import Function

# A layer with one of these runs its communication, in forward or in backward, in user buffers.
USER_BUFFERS = ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop", "ub_overlap_ag_dgrad", "ub_overlap_rs_dgrad",
                "ub_bulk_dgrad", "ub_bulk_wgrad")  # fmt: skip


class _Running(threading.local):
    """The layer forward that is running on this thread."""

    records_gradients = False  # asked outside of the autograd function, in which gradients look switched off
    was_asked = False  # whether one of the names below came by


_running = _Running()


# ---- where we are -----------------------------------------------------------------------------------------------


def layer_forward(original: Function) -> Function:
    """Wrap the forward of a layer that inherits from Transformer Engine: note its site, count what passes us by."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        here = context.site()
        if here is not None and here.module is self:  # the inference layers call their parent's forward in training
            return original(self, x, *args, **kwargs)
        site = site_of(self)
        _running.was_asked, _running.records_gradients = False, torch.is_grad_enabled()
        # Backward may gather by name what forward gathered in user buffers: such a layer is no site in either.
        with context.at(None if _overlaps(self) else site):
            output = original(self, x, *args, **kwargs)
        if site is not None and not _running.was_asked:
            _count_unseen(site, x, output[0])
        if site is not None and site.kind == "row":
            feedback.contributed(output)
        return output

    return forward


def site_of(module: Any) -> Site | None:
    """The site that a layer is: none without a parallel dimension (experts, duplicated weights) or as output layer."""
    config = current()
    if config is None or module.parallel_mode not in ("row", "column") or model.is_output_layer(module, None):
        return None
    return Site(module.parallel_mode, module, config)


def _count_unseen(site: Site, x: Tensor, output: Tensor) -> None:
    """Count the collective of a layer that used none of our names, if it had to communicate at all."""
    layer: Any = site.module
    world = layer.tp_group.size() if layer.tp_group is not None else 1
    if world == 1 or (site.kind == "column" and not layer.sequence_parallel):
        return
    if site.kind == "column":
        collective, nbytes = "all_gather", x.nbytes
    elif layer.sequence_parallel:
        collective, nbytes = "reduce_scatter", output.nbytes * world
    else:
        collective, nbytes = "all_reduce", output.nbytes
    messages.deferred(_why_unseen(layer), exact_bytes(collective, nbytes, world), site.config)


def _overlaps(layer: Any) -> bool:
    """Whether some of the layer's communication runs in user buffers, beside its matrix product.

    Backward gathers the input again; by user buffers it would be the exact one, even where forward gathered by name.
    """
    return any(getattr(layer, name, False) for name in USER_BUFFERS)


def _why_unseen(layer: Any) -> str:
    if not layer.training and any(kind.__name__.startswith("Inference") for kind in type(layer).__mro__):
        return "NVLS kernel"
    if _overlaps(layer):
        return "user-buffer overlap"
    if getattr(layer, "symmetric_ar_type", None) is not None:
        return "symmetric-memory all-reduce"
    return "inside Transformer Engine"


# ---- what is sent -----------------------------------------------------------------------------------------------


def all_reduce(original: Function) -> Function:
    """Row all-reduce, and that of a column layer's gradient."""

    def allreduce(inp: Any, tp_group: Any = None, async_op: bool = False) -> Any:
        return _sent_or_exact(original, "all_reduce", inp, tp_group, async_op)

    return allreduce


def reduce_scatter(original: Function) -> Function:
    """Row reduce-scatter, and that of a column layer's gradient."""

    def reduce_scatter_along_first_dim(inp: Any, tp_group: Any, async_op: bool = False) -> Any:
        return _sent_or_exact(original, "reduce_scatter", inp, tp_group, async_op)

    return reduce_scatter_along_first_dim


def gather(original: Function) -> Function:
    """Column all-gather, and that of a row layer's gradient."""

    def gather_along_first_dim(inp: Any, process_group: Any, async_op: bool = False, quantizer: Any = None) -> Any:
        return _sent_or_exact(original, "all_gather", inp, process_group, async_op, quantizer)

    return gather_along_first_dim


def _sent_or_exact(original: Function, collective: str, x: Any, group: Any, async_op: bool, *quantizer: Any) -> Any:
    """The result and the handle of a collective, compressed or by the original."""
    if type(x) is Tensor and context.site() is not None:
        x = x.contiguous()  # what a strided tensor holds is summed in a copy of it
    return _send(collective, x, group, async_op, *quantizer) or original(x, group, async_op, *quantizer)


def _send(collective: str, x: Any, group: Any, async_op: bool, quantizer: Any = None) -> tuple[Tensor, Any] | None:
    """What Transformer Engine's collectives return, result and handle, or None: call the original."""
    site = context.site()
    if site is None or group is None:
        return None
    _running.was_asked = True
    world = group.size()
    if quantizer is not None or type(x) is not Tensor:
        one_byte_each = torch.Size(x.size()).numel()
        messages.deferred("FP8", exact_bytes(collective, one_byte_each, world), site.config)
        return None
    if site.kind == ("column" if collective == "all_gather" else "row"):  # activations
        with torch.set_grad_enabled(_running.records_gradients):
            call = differentiable.planned(site.kind, collective, x, group)
    else:
        plan = gradients.planned(collective, x, group, site)
        call = None if plan is None else differentiable.Planned(plan)
    if call is None:
        return None
    out = None  # an all-reduce writes its result into x, the others beside it
    if collective != "all_reduce":
        rows = x.size(0) * world if collective == "all_gather" else x.size(0) // world
        out = x.new_empty(rows, *x.shape[1:])
    result = differentiable.send(call, x, site, out, async_op)
    return (x if out is None else out, result) if async_op else (result, None)


def is_present() -> bool:
    """Whether Megatron found Transformer Engine; without it the classes of its extension are stand-ins."""
    from megatron.core.extensions import transformer_engine

    return bool(transformer_engine.HAVE_TE)
