"""Megatron's two linear layers, small, with the same weights in every run; and one forward and backward of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

WORLD = 2
ROWS, HIDDEN, INNER = 6, 96, 40  # a layer's [sequence, batch=1, ...]; blocks of 32 with a tail


def linear(kind: str, sequence_parallel: bool, dtype: torch.dtype, **options: Any) -> Any:
    """One of Megatron's two linear layers, with the same weights in every run."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import layers

    config = ModelParallelConfig(
        tensor_model_parallel_size=WORLD,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    options |= {"config": config, "init_method": partial(torch.nn.init.normal_, std=0.3), "bias": False}
    if kind == "row":
        return layers.RowParallelLinear(INNER, HIDDEN, input_is_parallel=True, skip_bias_add=False, **options)
    return layers.ColumnParallelLinear(HIDDEN, INNER, gather_output=False, **options)


def step(layer: Any, x: Tensor, upstream: Tensor) -> dict[str, Tensor | None]:
    """Output and gradients of one forward and backward with a given gradient of the output."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y, _ = layer(x)
    y.backward(upstream)
    return {"y": y.detach().clone(), "dgrad": x.grad, "wgrad": layer.weight.grad}


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
