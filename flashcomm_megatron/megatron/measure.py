"""Whether a layer returns its input plus what its row-parallel layers returned, judged by a sample of its tokens.

What remains of ``output - input - contributions`` must be the rounding of a few additions in the layer's dtype:
everywhere at most a few units in the last place, and in the mean one of them. A contribution that is small beside the
stream could hide a multiplier in that rounding, but not from the mean over many values: the multiplier that explains
the output best must be 1 for each contribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

VALUES = 2**20  # of a sample, about
UNITS = 4.0  # of the last place, at most, that a value may differ
MULTIPLIER = 0.05  # how far from 1 the multiplier of a contribution may be found


def sample(x: Tensor) -> Tensor:
    """A copy of every k-th row of ``x``, about a million values."""
    rows = x.detach().reshape(-1, x.size(-1)) if x.dim() else x.detach().reshape(1, 1)
    return rows[:: max(1, rows.numel() // VALUES)].clone()


def adds_up(x: Tensor, output: Tensor, contributions: Sequence[Tensor]) -> bool:
    """Whether ``output`` is ``x`` plus all ``contributions``; False for none of them, or of another shape."""
    if not contributions or any(each.shape != x.shape for each in (output, *contributions)):
        return False
    unit = max(torch.finfo(each.dtype).eps for each in (x, output, *contributions))
    parts = [each.double() for each in contributions]
    size = x.double().abs() + output.double().abs() + sum(each.abs() for each in parts)
    rest = output.double() - x.double() - sum(parts)
    if not bool((rest.abs() <= UNITS * unit * size).all()) or not bool(rest.norm() <= unit * size.norm()):
        return False
    # What each part must be multiplied with to explain ``part + rest`` best; NaN, which fails, if it is zero.
    multipliers = [float((part * (part + rest)).sum() / part.square().sum()) for part in parts]
    return all(abs(multiplier - 1.0) <= MULTIPLIER for multiplier in multipliers)
