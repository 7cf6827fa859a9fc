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


class Fp8Padding(torch.nn.Module):
    """Rows padded to multiples of 16, as FP8's matrix products want them; for one matrix at a time."""

    def __init__(self, matrices: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, list[int]]:
        """The padded matrix, and how many rows it has."""
        padded = [-(-each // 16) * 16 for each in rows]
        return torch.nn.functional.pad(x, (0, 0, 0, padded[0] - rows[0])), padded


class Fp8Unpadding(Fp8Padding):
    """The other way."""

    def forward(self, x: torch.Tensor, rows: list[int]) -> torch.Tensor:  # type: ignore[override]
        """Without the rows that were added."""
        return x[: rows[0]]


def __getattr__(name: str) -> Any:
    if name in ("DotProductAttention", "GroupedLinear", "RMSNorm"):
        return type(name, (torch.nn.Module,), {})
    raise AttributeError(name)
