"""The scan."""

from typing import Any

from torch import Tensor


def mamba_split_conv1d_scan_combined(
    projected: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, *others: Any, **options: Any
) -> Tensor:
    """[batch, tokens, z x B C dt] to [batch, tokens, inner]: the first ``inner`` features."""
    inner = (projected.size(-1) - weight.size(0)) - dt_bias.size(0)
    return projected[..., :inner]


def mamba_chunk_scan_combined(*args: Any, **options: Any) -> Any:
    """Not called in training."""
    raise NotImplementedError
