"""Which step a rotated block (rotated.py) of few levels takes, and by how much coefficients may then be off."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KEY_SHIFT = 20  # a key counts float32 bit patterns in units of 2**20: eight steps an octave
NEAREST = 32  # steps of at most this many levels are rounded to nearest, others up
LEAST_KEY = (127 - 100) << 3  # 2**-100
SEARCHED = 16  # up to so many levels steps are chosen by their squared error
TRIED = 3  # steps to choose from


def best_keys(largest: Tensor, coefficients: Tensor, unit: Tensor, levels: int) -> Tensor:
    """int32 [blocks]: of each block the key of least squared error among ``largest`` and those below it."""
    stride = 2 if levels < 8 else 1
    tried = [(largest - stride * n).clamp(min=LEAST_KEY) for n in range(TRIED)]
    best, least = tried[0], _squared_errors(tried[0], tried[-1], coefficients, unit, levels)
    for keys in tried[1:]:
        errors = _squared_errors(keys, tried[-1], coefficients, unit, levels)
        best, least = torch.where(errors < least, keys, best), torch.minimum(errors, least)
    return best


def steps_off(levels: int) -> float:
    """By how many steps a block's coefficients are off in the mean, at most, in 64ths, rounded up.

    Half a step, or what the largest lies beyond the end that does not reach as far. A step found by the search has a
    squared error no larger than the first one's, which is at most 1.25 or 1.5 times as long.
    """
    zero = levels // 2
    off = max(0.5, zero * (17 / 16 if levels <= NEAREST else 1.0) - (levels - 1 - zero))
    if levels <= SEARCHED:  # which counts in eighths
        off = (off + 1 / 16) * (1.5 if levels < 8 else 1.25) + 1 / 16
    return (math.floor(64 * off) + 2) / 64


def _squared_errors(keys: Tensor, finest: Tensor, coefficients: Tensor, unit: Tensor, levels: int) -> Tensor:
    """int64 [blocks]: what codes in the steps of ``keys`` are off, squared, in squares of 1/64 of the power of two at
    or below the ``finest`` step. ``unit``: what a step of one is among the coefficients, with its sign."""
    step, zero = (keys << KEY_SHIFT).view(torch.float32), levels // 2
    fine = (coefficients * (1.0 / (step * unit) * 8)[:, None]).round().long()
    codes = ((fine + 4) >> 3).clamp(-zero, levels - 1 - zero)
    eighths = (8 + (keys & 7)) << ((keys >> 3) - (finest >> 3))
    return (fine - 8 * codes).square().sum(1) * eighths.long().square()
