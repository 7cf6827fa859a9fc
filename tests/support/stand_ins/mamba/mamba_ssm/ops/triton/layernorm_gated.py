"""The gated norm."""

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Norms each group of features; Megatron's mixer has gated them before."""

    def __init__(self, width: int, eps: float = 1e-5, group_size: int | None = None, **options: Any) -> None:
        super().__init__()
        self.weight, self.eps, self.group = torch.nn.Parameter(torch.ones(width)), eps, group_size or width

    def forward(self, x: Tensor) -> Tensor:
        """The normed input."""
        groups = x.unflatten(-1, (-1, self.group))
        return torch.nn.functional.rms_norm(groups, groups.shape[-1:], eps=self.eps).flatten(-2) * self.weight
