"""What takes the place of Megatron-Core's linear layers and of the collectives that they call in forward.

A replacement asks whether to compress here (differentiable.py) and calls the original where the answer is no.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import context, differentiable, feedback, model
from .patching import Function, Replace


def row_forward(original: Function) -> Function:
    """A row-parallel layer: note the site, and show its output to whoever measures the layer around it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with context.at(context.site_of("row", self)):
            output = original(self, *args, **kwargs)
        feedback.contributed(output)
        return output

    return forward


def column_forward(original: Function) -> Function:
    """A column-parallel layer: note the site, and none for the output layer."""

    def forward(self: Any, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        with context.at(None if model.is_output_layer(self, weight) else context.site_of("column", self)):
            return original(self, input_, weight, *args, **kwargs)

    return forward


def _sum(collective: str) -> Replace:
    def replace(original: Function) -> Function:
        def sum_of_row_layer(input_: Tensor, group: Any = None) -> Any:
            call = differentiable.planned("row", collective, input_, group)
            if call:
                return differentiable.run(input_, group, call)
            return original(differentiable.as_original_wants("row", input_), group)

        return sum_of_row_layer

    return replace


all_reduce = _sum("all_reduce")  # of a row-parallel layer
reduce_scatter = _sum("reduce_scatter")  # the same under sequence parallelism


def gather(original: Function) -> Function:
    """Input of a column-parallel layer under sequence parallelism, where the weight is frozen."""

    def gather_from_sequence_parallel_region(
        input_: Tensor, tensor_parallel_output_grad: bool = True, group: Any = None
    ) -> Any:
        reason = None if tensor_parallel_output_grad else "argument tensor_parallel_output_grad"
        call = differentiable.planned("column", "all_gather", input_, group, reason)
        if call:
            return differentiable.run(input_, group, call)
        return original(differentiable.as_original_wants("column", input_), tensor_parallel_output_grad, group)

    return gather_from_sequence_parallel_region


def gather_tensor(original: Function) -> Function:
    """Input of a column-parallel layer under sequence parallelism, in forward and again in backward."""

    def all_gather_into_tensor(
        output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        call = differentiable.planned("column", "all_gather", input_tensor, group)
        if not call:
            input_tensor = differentiable.as_original_wants("column", input_tensor)
            return original(output_tensor, input_tensor, group=group, async_op=async_op)
        handle = differentiable.send(call, input_tensor, context.site(), output_tensor, async_op)
        return handle if async_op else None

    return all_gather_into_tensor
