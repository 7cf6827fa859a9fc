"""A norm and a column-parallel linear layer in one autograd function."""

from typing import Any

import torch
from torch import Tensor

from ..distributed import allreduce, gather_along_first_dim, reduce_scatter_along_first_dim
from .base import TransformerEngineBaseModule


class _LayerNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inp: Tensor, ln_weight: Tensor, ln_bias: Any, weight: Tensor, bias: Any, layer: Any
    ) -> Tensor:
        normed = torch.nn.functional.layer_norm(inp, inp.shape[-1:], ln_weight, ln_bias)
        total = normed
        if layer.sequence_parallel:
            total, _ = gather_along_first_dim(normed, layer.tp_group, quantizer=layer.quantizer)
        if ctx is not None:
            ctx.layer = layer
            ctx.save_for_backward(inp, ln_weight, ln_bias, weight, normed)
        return total @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layer, (inp, ln_weight, ln_bias, weight, normed) = ctx.layer, ctx.saved_tensors
        total, dgrad = normed, grad_outputs[0] @ weight
        if layer.sequence_parallel:
            total, gathering = gather_along_first_dim(normed, layer.tp_group, async_op=True, quantizer=layer.quantizer)
            dgrad, summing = reduce_scatter_along_first_dim(dgrad, layer.tp_group, async_op=True)
            gathering.wait()
            summing.wait()
        elif layer.tp_size > 1:
            dgrad, summing = allreduce(dgrad, layer.tp_group, async_op=True)
            summing.wait()
        wgrad = grad_outputs[0].flatten(0, -2).t() @ total.flatten(0, -2)
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in (inp, ln_weight, ln_bias)]
            again = torch.nn.functional.layer_norm(leaves[0], inp.shape[-1:], leaves[1], leaves[2])
        return *torch.autograd.grad(again, leaves, dgrad), wgrad, None, None


class LayerNormLinear(TransformerEngineBaseModule):
    """A linear layer of its normalized input."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features))
        self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features))

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """The output."""
        args = inp, self.layer_norm_weight, self.layer_norm_bias, self.weight, None, self
        if torch.is_grad_enabled():
            output: Tensor = _LayerNormLinear.apply(*args)
            return output
        return _LayerNormLinear.forward(None, *args)
