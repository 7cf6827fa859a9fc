"""The linear layer, and the autograd function that communicates."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import allreduce, gather_along_first_dim, reduce_scatter_along_first_dim, symmetric_all_reduce
from .base import TransformerEngineBaseModule


def _linear_forward_impl(ctx: Any, weight: Tensor, inp: Tensor, layer: Any) -> Tensor:
    total = inp
    if layer.parallel_mode == "column" and layer.sequence_parallel:
        if layer.ub_overlap_ag_fprop:  # user buffers move the bytes in the real package
            total = inp.new_empty(layer.tp_size * inp.size(0), *inp.shape[1:])
            dist.all_gather_into_tensor(total, inp.contiguous(), group=layer.tp_group)
        else:
            total, _ = gather_along_first_dim(inp, layer.tp_group, quantizer=layer.quantizer)
    out = total @ weight.t()
    if layer.parallel_mode == "row" and layer.tp_size > 1:
        if layer.sequence_parallel:
            out, _ = reduce_scatter_along_first_dim(out, layer.tp_group)
        elif layer.symmetric_ar_type is not None:
            out, _ = symmetric_all_reduce(out, layer.tp_group, all_reduce_type=layer.symmetric_ar_type)
        else:
            out, _ = allreduce(out, layer.tp_group)
    if ctx is not None:
        ctx.layer = layer
        ctx.save_for_backward(inp, weight)
    return out


def _linear_backward_impl(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    layer, (inp, weight) = ctx.layer, ctx.saved_tensors
    grad_output = layer.grad_output_preprocess(ctx, grad_output)
    total, dgrad = inp, grad_output @ weight
    if layer.parallel_mode == "column" and layer.sequence_parallel:
        total, gathering = gather_along_first_dim(inp, layer.tp_group, async_op=True, quantizer=layer.quantizer)
        dgrad, summing = reduce_scatter_along_first_dim(dgrad, layer.tp_group, async_op=True)
        gathering.wait()
        summing.wait()
    elif layer.parallel_mode == "column" and layer.tp_size > 1:
        dgrad, summing = allreduce(dgrad, layer.tp_group, async_op=True)
        summing.wait()
    return grad_output.flatten(0, -2).t() @ total.flatten(0, -2), dgrad, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, inp: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        return _linear_forward_impl(ctx, weight, inp, layer)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _linear_backward_impl(ctx, grad_output)


class _CustomOp(torch.autograd.Function):
    """What compiled code runs from 2.20 on: the same implementations, whatever takes the place of ``_Linear``'s."""

    forward, backward = staticmethod(_Linear.forward), staticmethod(_Linear.backward)


_linear_op = torch.compiler.disable(_CustomOp.apply)


class Linear(TransformerEngineBaseModule):
    """``inp @ weight.T``, with the communication of its parallel dimension."""

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """The output."""
        if torch.compiler.is_compiling():
            output: Tensor = _linear_op(self.weight, inp, None, self)
            return output
        if torch.is_grad_enabled():
            output = _Linear.apply(self.weight, inp, None, self)
            return output
        return _Linear.forward(None, self.weight, inp, None, self)
