"""Tokens of a mixture of experts, on request (``--flash-comm-experts``): the all-to-all of Megatron's token dispatcher.

The dispatcher sends tokens [n, hidden] and their probabilities [n] through the same function; only tokens, which have
two dimensions, are compressed, and their gradients on the way back at the gradients' width. Routing maps, counts and
probabilities stay exact. Off by default: an expert sees its tokens rounded, which no residual takes up.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives.alltoall import all_to_all
from ..config import Config, current
from ..observe import messages as announce
from . import context as where
from .context import Function
from .patching import Seam

Splits = Sequence[int] | None


def _all_to_all(original: Function) -> Function:
    defaults = {name: each.default for name, each in inspect.signature(original).parameters.items()}

    def tokens(
        group: Any, input_: Tensor, output_split_sizes_: Splits = None, input_split_sizes: Splits = None, **more: Any
    ) -> Any:
        config = current()
        if config is None or not config.experts or input_.dim() != 2 or where.observer() is not None:
            return original(group, input_, output_split_sizes_, input_split_sizes, **more)
        asked = [name for name, value in more.items() if value != defaults.get(name, inspect.Parameter.empty)]
        if asked:  # for example use_nccl_stream, from Megatron 0.18 on: only the original knows what it means
            announce.deferred(f"argument {asked[0]}", input_.nbytes, config)
            return original(group, input_, output_split_sizes_, input_split_sizes, **more)
        return _Tokens.apply(input_, group, output_split_sizes_, input_split_sizes, config)  # type: ignore[no-untyped-call]

    return tokens


class _Tokens(torch.autograd.Function):
    """Rows to the ranks whose experts want them; gradients travel back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, outs: Splits, ins: Splits, config: Config) -> Any:
        ctx.group, ctx.outs, ctx.ins, ctx.config = group, outs, ins, config
        return all_to_all(x, group, config, output_splits=outs, input_splits=ins)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        legs = ctx.config.gradient_legs
        x = grads[0].contiguous()
        if legs is not None:
            back = all_to_all(x, ctx.group, ctx.config, output_splits=ctx.ins, input_splits=ctx.outs, legs=legs)
            return back, None, None, None, None
        rows = sum(ctx.ins) if ctx.ins is not None else x.size(0)
        back = x.new_empty((rows, *x.shape[1:]))
        dist.all_to_all_single(back, x, _sizes(ctx.ins), _sizes(ctx.outs), group=ctx.group)
        return back, None, None, None, None


def _sizes(splits: Splits) -> list[int] | None:
    return None if splits is None else list(splits)


ROWS = (
    Seam("megatron.core.transformer.moe.token_dispatcher", "all_to_all",
         ("group", "input_", "output_split_sizes_", "input_split_sizes"), _all_to_all,
         "tokens to and from their experts; the dispatcher's own binding, looked up at every call"),
)  # fmt: skip
