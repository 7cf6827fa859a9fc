"""The fused norm that Megatron takes where apex is installed."""

from typing import Any

import torch
from torch import Tensor

calls = 0


class FusedLayerNormAffineFunction:
    """torch's norm by the name and the arguments of apex's autograd function."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float) -> Tensor:
        """Looked at for its arguments only."""
        raise NotImplementedError

    @staticmethod
    def apply(input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Any, eps: float) -> Tensor:
        """The normalized input."""
        global calls
        calls += 1
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
