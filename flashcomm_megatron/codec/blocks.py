"""Values in blocks, their extremes, and bfloat16 as the upper half of float32: the arithmetic formats share.

Everything here is defined by bit patterns, never by a library's rounding or order of reduction, so that another
implementation can agree bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
NAN_BITS = 0x7FC0  # the one NaN the formats write, as bfloat16


def in_blocks(x: Tensor, block: int) -> Tensor:
    """[n] -> [blocks, block]; the last block is filled with its last value, which changes no extreme."""
    missing = -x.numel() % block
    return torch.cat([x, x[-1:].expand(missing)]).view(-1, block)


def ordered_keys(x: Tensor) -> Tensor:
    """Integers in the order of the values' bit patterns: -0 below +0, NaN outermost.

    It is the one order in which a minimum does not depend on who computes it. The map is its own inverse on integers.
    """
    integer = {4: torch.int32, 2: torch.int16}[x.element_size()]
    return _flip(x.view(integer))


def from_ordered_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of ``dtype`` that have these keys."""
    return _flip(keys).view(dtype)


def finite_keys(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether all values between two keys are finite."""
    infinity = ordered_keys(torch.tensor([math.inf, -math.inf], dtype=dtype, device=low.device))
    return (high < infinity[0]) & (low > infinity[1])


def extremes(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest value of every row as float32 (zero where not finite), and whether the row is finite."""
    keys = ordered_keys(blocks)
    low, high = keys.amin(1), keys.amax(1)
    finite = finite_keys(low, high, blocks.dtype)
    values = [from_ordered_keys(torch.where(finite, key, 0), blocks.dtype).float() for key in (low, high)]
    return values[0], values[1], finite


def high_half_value(x: Tensor) -> Tensor:
    """float32 rounded toward zero to a bfloat16 number, kept as float32."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32)


def next_up(x: Tensor) -> Tensor:
    """The bfloat16 number next farther from zero, kept as float32."""
    return (x.view(torch.int32) + 0x10000).view(torch.float32)


def round_down(x: Tensor) -> Tensor:
    """float32 rounded toward minus infinity to a finite bfloat16 number, kept as float32."""
    truncated = high_half_value(x)
    return torch.where(truncated > x, next_up(truncated), truncated).clamp(min=-BFLOAT16_MAX)


def high_half(x: Tensor) -> Tensor:
    """Upper 16 bits of float32 as int32 in 0..65535."""
    return (x.view(torch.int32) >> 16) & 0xFFFF


def from_high_half(bits: Tensor) -> Tensor:
    """float32 whose upper 16 bits are ``bits`` and whose lower ones are zero."""
    return (bits << 16).view(torch.float32)


def _flip(bits: Tensor) -> Tensor:
    """Sign-magnitude bit patterns to two's complement order, and back."""
    shift, mask = {4: (31, 0x7FFFFFFF), 2: (15, 0x7FFF)}[bits.element_size()]
    return bits ^ ((bits >> shift) & mask)
