"""Asymmetric block integers of 2 to 8 bits: the format of Flash Communication (arXiv 2412.04964, section 3).

The idea
--------
Neighbouring values of an activation have similar magnitudes. So each row is cut into blocks of ``block`` values. Each
block travels as its minimum, a scale and one small integer for each value. The integers count steps of the scale,
starting at the minimum; the largest integer reaches the maximum. Decoding is one multiplication and one addition. The
error of a value is at most half a step. One large value makes the steps of its whole block large, so small blocks are
more accurate, and cost more bytes: minimum and scale take 32 bits a block::

    scale = (max - min) / (2**bits - 1)        q = round((x - min) / scale)        x' = min + q * scale

Sending the minimum instead of a rounded zero point keeps blocks that do not straddle zero exact to half a
step (a zero point clamped into the integer range is off by the whole offset), and makes constants exact.

A block of 8 numbers at 4 bits. The minimum is -1.2, the range 3.3, so the scale is 3.3 / 15 = 0.22; both are rounded to
bfloat16, to -1.203 and 0.2207. The 8 codes are 32 bits, so 16 bytes of bfloat16 have become 8::

    >>> x = torch.tensor([0.3, -1.2, 0.7, 2.1, -0.4, 0.0, 1.5, -0.9])
    >>> plane, scales, minima = split_sections(Uniform(4, 8).encode(x), [4, 2, 2])
    >>> unpack([plane], 4, block=8, row=8)[0].tolist()
    [7, 0, 9, 15, 4, 5, 12, 1]
    >>> [round(value, 2) for value in Uniform(4, 8).decode_ref(Uniform(4, 8).encode(x), 8).tolist()]
    [0.34, -1.2, 0.78, 2.11, -0.32, -0.1, 1.45, -0.98]

The wire
--------
Rows of ``width`` values have ``ceil(width / block)`` blocks each, the last one short where the block does not divide
the width, and ``ceil(width / 8)`` octets of codes. Sections start on a 16-byte boundary, gaps are zero::

    | 8-, 4-, 2-, 1-bit planes ...        | scales         | minima         |
    | octets * w bytes for each plane w   | blocks x bf16  | blocks x bf16  |

    bits    8  7      6    5    4  3    2
    planes  8  4+2+1  4+2  4+1  4  2+1  2       the first plane holds the low bits of every code

Inside a plane, values follow each other from the least significant bit of a byte upwards: 4-bit plane, byte 0 =
``q[0] | q[1] << 4``. Eight values are always whole bytes in every plane, so odd widths cost no bit twiddling.

Metadata is bfloat16 whatever the tensor's dtype, so a payload's size depends on the shape alone and it can be
decoded to any dtype. The minimum is rounded down and the scale up, so every value of the block lies in
``[min, min + levels * scale]`` and the error is at most half a scale. Two escapes use codes the pair cannot
otherwise take:

- scale = NaN: the block held a NaN or an Inf and decodes to NaN.
- scale with its sign bit set: the block is a constant that bfloat16 cannot hold. Its float32 bits are
  ``min << 16 | (scale & 0x7fff) << 1 | (q & 1)``.

Error: ``|x' - x| <= scale / 2`` plus the rounding to the output dtype, where
``scale <= (max - min + 2**-7 |min|) / levels * (1 + 2**-7)`` (without the ``|min|`` term when ``min`` is a
bfloat16 number). float32 values beyond bfloat16's largest number, 3.39e38, saturate.

This file is the definition in torch; ``csrc/format/codec.h`` is the same definition in C++ and CUDA, equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import ROUNDING, Codec, rounded
from .planes import (
    NAN_BITS,
    WIDTHS,
    extremes,
    from_blocks,
    from_half_words,
    from_high_half,
    half_words,
    high_half,
    high_half_value,
    in_blocks,
    join_sections,
    next_up,
    of_each_value,
    pack,
    plane_bytes,
    round_down,
    rows_of,
    split_sections,
    unpack,
)

HUGE = 2.0**118  # scales from here on could overflow float32 in min + q * scale: halve first
TINY = 2.0**-100  # scales below have a reciprocal beyond float32: scale up first


@dataclass(frozen=True)
class Uniform(Codec):
    """Codec of asymmetric integers: ``bits`` per value, one bfloat16 scale and minimum per ``block`` values."""

    bits: int
    block: int

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits={self.bits}: choose {WIDTHS[0]} to {WIDTHS[-1]}.")
        if self.block < 8 or self.block % 8:
            raise ValueError(f"block={self.block}: choose a multiple of 8, for example 32, 64 or 128.")

    @property
    def native(self) -> tuple[int, int, int]:
        return 0, self.bits, self.block

    @property
    def levels(self) -> int:
        """Steps between the smallest and the largest code: 2**bits - 1."""
        return (1 << self.bits) - 1

    def section_bytes(self, numel: int, width: int | None = None) -> list[int]:
        rows, row = rows_of(numel, width)
        blocks = rows * math.ceil(row / self.block)
        return [*plane_bytes(rows * math.ceil(row / 8) * 8, self.bits), 2 * blocks, 2 * blocks]

    # ---- the definition ------------------------------------------------------------------------------------

    def encode_ref(self, x: Tensor, width: int | None = None) -> Tensor:
        row = rows_of(x.numel(), width)[1]
        blocks = in_blocks(x, self.block, row)
        low, high, finite = extremes(blocks)
        values = blocks.float()
        minimum = round_down(low)
        scale, prescale, inverse = self._scale(minimum, high)
        scaled = (values * prescale[:, None] - (minimum * prescale)[:, None]) * inverse[:, None]
        codes = torch.where(finite[:, None], scaled, 0.0).round().clamp(0, self.levels).to(torch.uint8)

        minimum_bits, scale_bits = high_half(minimum), high_half(scale)
        bits = low.view(torch.int32)
        escaped = finite & (low == high) & (minimum != low)
        codes = torch.where(escaped[:, None], (bits & 1)[:, None].to(torch.uint8), codes)
        minimum_bits = torch.where(escaped, bits >> 16, minimum_bits)
        scale_bits = torch.where(escaped, 0x8000 | ((bits >> 1) & 0x7FFF), scale_bits)
        minimum_bits = torch.where(finite, minimum_bits, NAN_BITS)
        scale_bits = torch.where(finite, scale_bits, NAN_BITS)

        return join_sections([*pack(codes, row, self.bits), half_words(scale_bits), half_words(minimum_bits)])

    def decode_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        return self._decode(payload, numel, torch.float32, width)

    def decode_sum_ref(
        self, payloads: Sequence[Tensor], numel: int, dtype: torch.dtype, width: int | None = None
    ) -> Tensor:
        total = self._decode(payloads[0], numel, dtype, width)
        for payload in payloads[1:]:
            total = total + self._decode(payload, numel, dtype, width)
        return rounded(total, dtype, self.bound_of_sum(payloads, numel, dtype, width))

    def bounds_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        """float32 [numel]: half a scale, zero where a constant is exact."""
        row = rows_of(numel, width)[1]
        scale = from_high_half(from_half_words(split_sections(payload, self.section_bytes(numel, width))[-2]))
        return of_each_value(torch.where(scale.signbit(), 0.0, scale * ROUNDING), self.block, row)

    def _scale(self, minimum: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per block: scale, power-of-two prescale, and the reciprocal of the prescaled scale."""
        halve = torch.where(high * 0.5 - minimum * 0.5 >= 2.0**126, 0.5, 1.0)  # max - min overflows float32
        spread = (high * halve - minimum * halve).clamp(min=0)
        scale = high_half_value(spread / torch.full_like(spread, self.levels))  # a scalar divisor is inverted on CUDA
        scale = torch.where(scale * self.levels < spread, next_up(scale), scale) / halve
        prescale = torch.where((scale > 0) & (scale < TINY), 2.0**64, halve)
        return scale, prescale, torch.where(scale > 0, 1.0 / (scale * prescale), 0.0)

    def _decode(self, payload: Tensor, numel: int, dtype: torch.dtype, width: int | None) -> Tensor:
        """float32 values of one payload, within the finite range of ``dtype``."""
        if numel == 0:
            return torch.empty(0, dtype=torch.float32, device=payload.device)
        row = rows_of(numel, width)[1]
        *planes, scales, minima = split_sections(payload, self.section_bytes(numel, width))
        codes = unpack(planes, self.bits, self.block, row)
        scale_bits, minimum_bits = from_half_words(scales), from_half_words(minima)
        scale, minimum = from_high_half(scale_bits), from_high_half(minimum_bits)

        halve = torch.where(scale >= HUGE, 0.5, 1.0)
        limit = torch.finfo(dtype).max * halve[:, None]
        values = (minimum * halve)[:, None] + codes.float() * (scale * halve)[:, None]
        values = values.clamp(-limit, limit) / halve[:, None]

        constant = (minimum_bits << 16) | ((scale_bits & 0x7FFF) << 1)
        constant_values = (constant[:, None] | (codes.int() & 1)).view(torch.float32)
        escaped = ((scale_bits & 0x8000) != 0)[:, None]
        values = torch.where(escaped, constant_values, values)
        values = torch.where(scale.isnan()[:, None] & ~escaped, math.nan, values)
        return from_blocks(values, row)
