"""The scan."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def mamba_split_conv1d_scan_combined(
    projected: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, decay: Tensor, D: Tensor, ngroups: int = 1,
    **options: Any,
) -> Tensor:  # fmt: skip
    """[batch, tokens, z x B C dt] to [batch, tokens, inner]: every token against all before it, as attention does."""
    (wide, taps), heads = weight.shape, dt_bias.numel()
    inner = projected.size(-1) - wide - heads
    z, mixed, dt = projected.split([inner, wide, heads], -1)
    mixed = F.conv1d(F.pad(mixed.transpose(1, 2), (taps - 1, 0)), weight.unsqueeze(1), bias, groups=wide)
    x, b, c = F.silu(mixed).transpose(1, 2).split([inner, (wide - inner) // 2, (wide - inner) // 2], -1)
    x, dt = x.unflatten(-1, (heads, -1)), F.softplus(dt + dt_bias)
    b, c = (each.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for each in (b, c))
    past = (decay * dt).cumsum(1)
    future = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1).unsqueeze(-1)
    kept = (past.unsqueeze(2) - past.unsqueeze(1)).masked_fill(future, -torch.inf).exp()
    y = torch.einsum("bihn,bjhn,bijh,bjh,bjhp->bihp", c, b, kept, dt, x) + D.view(heads, -1) * x
    return y.flatten(2) * F.silu(z)


def mamba_chunk_scan_combined(*args: Any, **options: Any) -> Any:
    """Not called in training."""
    raise NotImplementedError
