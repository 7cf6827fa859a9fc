"""Mixtures of experts: tokens between ranks, on request, and shared experts that communicate by themselves.

**Tokens** (``--flash-comm-experts``): the all-to-all of Megatron's token dispatcher. The dispatcher sends tokens
[n, hidden] and their probabilities [n] through the same function; only tokens, which have two dimensions, are
compressed, and their gradients on the way back at the gradients' width. Routing maps, counts and probabilities stay
exact. Off by default: an expert sees its tokens rounded, which no residual takes up.

**Shared experts** are ordinary linear layers, unless they run beside the dispatcher (``--moe-shared-expert-overlap``)
or fused: then their linear layers do not communicate, and SharedExpertMLP gathers and sums around them, by names of its
own module. Those are compressed at the site of the linear layer that they serve. The gradient of an input that was not
gathered (no sequence parallelism) is summed by Megatron as before.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..collectives.alltoall import all_to_all
from ..config import Config, current
from ..observe import messages
from . import context, layers, modes
from .patching import Function, Replace

Splits = Sequence[int] | None


# ---- tokens ---------------------------------------------------------------------------------------------------------


def tokens(original: Function) -> Function:
    """Tokens to and from their experts."""

    def all_to_all(
        group: Any, input_: Tensor, output_split_sizes_: Splits = None, input_split_sizes: Splits = None
    ) -> Any:
        config = current()
        if config is None or not config.experts or input_.dim() != 2 or context.observer() is not None:
            return original(group, input_, output_split_sizes_, input_split_sizes)
        reason = modes.why_not()
        if reason is not None:
            messages.deferred(reason, input_.nbytes, config)
            return original(group, input_, output_split_sizes_, input_split_sizes)
        by_row = modes.is_batch_invariant(_running.dispatcher)
        return _Tokens.apply(input_, group, output_split_sizes_, input_split_sizes, config, by_row)  # type: ignore[no-untyped-call]

    return all_to_all


class _Running(threading.local):
    """Whose forward is running on this thread."""

    dispatcher: Any = None  # of tokens
    shared: Any = None  # SharedExpertMLP that communicates by itself


_running = _Running()


def _noting(place: str) -> Replace:
    """Wrap methods whose owner is noted in ``place`` of ``_running`` while they run."""

    def replace(original: Function) -> Function:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            outer = getattr(_running, place)
            setattr(_running, place, self)
            try:
                return original(self, *args, **kwargs)
            finally:
                setattr(_running, place, outer)

        return method

    return replace


dispatcher_method = _noting("dispatcher")  # since the all-to-all is not handed its configuration
shared_method = _noting("shared")  # of SharedExpertMLP, which communicates by the names below


_held: set[str] = set()  # of this rank's models: "a mixture"; "elsewhere": in a stage of their own, maybe another one's


def met(model: nn.Module) -> None:
    """Note whether a model that ran has mixtures of experts, here or, as its configuration says, in other stages."""
    for module in model.modules():
        if any(kind.__name__ == "MoELayer" for kind in type(module).__mro__):
            _held.add("a mixture")
        if getattr(getattr(module, "config", None), "num_moe_experts", None):
            _held.add("elsewhere")


def idle() -> str | None:
    """That tokens were to be compressed and none came; None: nothing is wrong, or no layer of this stage has any."""
    config = current()
    if config is None or not config.experts or _Tokens.ran or _held == {"elsewhere"}:
        return None
    return "--flash-comm-experts did nothing: no tokens went through the all-to-all of Megatron's dispatcher."


class _Tokens(torch.autograd.Function):
    """Rows to the ranks whose experts want them; gradients travel back the same way."""

    ran = False  # in this process

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, outs: Splits, ins: Splits, config: Config, by_row: bool) -> Any:
        _Tokens.ran = True
        ctx.group, ctx.outs, ctx.ins, ctx.config, ctx.by_row = group, outs, ins, config, by_row
        return all_to_all(x, group, config, output_splits=outs, input_splits=ins, by_row=by_row)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        legs = ctx.config.gradient_legs
        x = grads[0].contiguous()
        if legs is not None:
            splits = {"output_splits": ctx.ins, "input_splits": ctx.outs}
            back = all_to_all(x, ctx.group, ctx.config, **splits, legs=legs, by_row=ctx.by_row)
            return back, None, None, None, None, None
        rows = sum(ctx.ins) if ctx.ins is not None else x.size(0)
        back = x.new_empty((rows, *x.shape[1:]))
        dist.all_to_all_single(back, x, _sizes(ctx.ins), _sizes(ctx.outs), group=ctx.group)
        return back, None, None, None, None, None


def _sizes(splits: Splits) -> list[int] | None:
    return None if splits is None else list(splits)


# ---- shared experts that communicate by themselves -------------------------------------------------------------------


def shared_gather(original: Function) -> Function:
    """Input of the shared experts under sequence parallelism."""
    gather = layers.gather(original)

    def gather_from_sequence_parallel_region(
        input_: Tensor, tensor_parallel_output_grad: bool = True, group: Any = None
    ) -> Any:
        with context.at(_site("column", "linear_fc1")):
            return gather(input_, tensor_parallel_output_grad, _group(group))

    return gather_from_sequence_parallel_region


def _shared_sum(replace: Replace) -> Replace:
    def shared(original: Function) -> Function:
        inner = replace(original)

        def sum_of_shared_experts(input_: Tensor, group: Any = None) -> Any:
            with context.at(_site("row", "linear_fc2")):
                return inner(input_, _group(group))

        return sum_of_shared_experts

    return shared


shared_all_reduce = _shared_sum(layers.all_reduce)  # sum of the shared experts
shared_reduce_scatter = _shared_sum(layers.reduce_scatter)  # the same under sequence parallelism


def _site(kind: str, layer: str) -> context.Site | None:
    config, shared = current(), _running.shared
    return None if config is None or shared is None else context.Site(kind, getattr(shared, layer), config)


def _group(group: Any) -> Any:
    """The group that Megatron means where it hands none."""
    if group is not None or _running.shared is None:
        return group
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    return get_tensor_model_parallel_group()
