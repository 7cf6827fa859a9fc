"""Megatron-Core's forward collectives: every row of the layers' own bindings, and what takes its place.

A replacement asks whether to compress here (differentiable.py) and is the original where the answer is no.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import context as where
from . import differentiable
from .context import LAYERS, Function
from .patching import Seam


def _reduce(original: Function) -> Function:
    def reduce_from_tensor_model_parallel_region(input_: Tensor, group: Any = None) -> Any:
        call = differentiable.planned("row", "all_reduce", input_, group)
        return differentiable.run(differentiable.AllReduce, input_, group, call) if call else original(input_, group)

    return reduce_from_tensor_model_parallel_region


def _reduce_scatter(original: Function) -> Function:
    def reduce_scatter_to_sequence_parallel_region(input_: Tensor, group: Any = None, *args: Any, **kwargs: Any) -> Any:
        plain = not args and not kwargs  # neither uneven splits nor a shared output buffer
        ask = differentiable.planned if plain else differentiable.unfit
        call = ask("row", "reduce_scatter", input_, group)
        if call:
            return differentiable.run(differentiable.ReduceScatter, input_, group, call)
        return original(input_, group, *args, **kwargs)

    return reduce_scatter_to_sequence_parallel_region


def _gather(original: Function) -> Function:
    def gather_from_sequence_parallel_region(
        input_: Tensor, tensor_parallel_output_grad: bool = True, group: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        plain = tensor_parallel_output_grad and not args and not kwargs
        ask = differentiable.planned if plain else differentiable.unfit
        call = ask("column", "all_gather", input_, group)
        if call:
            return differentiable.run(differentiable.AllGather, input_, group, call)
        return original(input_, tensor_parallel_output_grad, group, *args, **kwargs)

    return gather_from_sequence_parallel_region


def _gather_tensor(original: Function) -> Function:
    def all_gather_into_tensor(
        output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        call = differentiable.planned("column", "all_gather", input_tensor, group)
        if not call:
            return original(output_tensor, input_tensor, group=group, async_op=async_op)
        handle = differentiable.send(call, input_tensor, where.site(), output_tensor, async_op)
        return handle if async_op else None

    return all_gather_into_tensor


ROWS = (
    Seam(LAYERS, "reduce_from_tensor_model_parallel_region", ("input_", "group"), _reduce,
         "row all-reduce; layers.py's own binding, so routers and token counts, which hold others, are not reached"),
    Seam(LAYERS, "reduce_scatter_to_sequence_parallel_region", ("input_", "group"), _reduce_scatter,
         "row reduce-scatter under sequence parallelism; layers.py's own binding"),
    Seam(LAYERS, "gather_from_sequence_parallel_region", ("input_", "tensor_parallel_output_grad", "group"), _gather,
         "column all-gather under sequence parallelism when the weight is frozen; layers.py's own binding"),
    Seam(LAYERS, "dist_all_gather_func", ("output_tensor", "input_tensor", "group", "async_op"), _gather_tensor,
         "column all-gather under sequence parallelism, forward and again for the weight gradient"),
)  # fmt: skip
