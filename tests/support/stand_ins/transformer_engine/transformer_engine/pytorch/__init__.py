"""The layers. What else Megatron derives classes from at import is an empty module."""

from types import SimpleNamespace
from typing import Any

import torch

from . import distributed, fp8
from .module.layernorm_linear import LayerNormLinear
from .module.linear import Linear

__all__ = ["LayerNorm", "LayerNormLinear", "Linear", "distributed", "fp8", "ops"]
ops = SimpleNamespace(Sequential=torch.nn.Sequential, FusibleOperation=torch.nn.Module)


class LayerNorm(torch.nn.LayerNorm):
    """torch's norm by the names that Megatron uses."""

    def __init__(self, normalized_shape: int = 0, eps: float = 1e-5, hidden_size: int = 0, **ignored: Any) -> None:
        super().__init__(normalized_shape or hidden_size, eps)


def __getattr__(name: str) -> Any:
    if name in ("DotProductAttention", "GroupedLinear", "RMSNorm"):
        return type(name, (torch.nn.Module,), {})
    raise AttributeError(name)
