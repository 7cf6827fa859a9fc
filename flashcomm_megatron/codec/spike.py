"""Bit splitting with spike reserving, 2 to 8 bits: the format of FlashCommunication V2 (arXiv 2508.03760).

The idea
--------
A few values of an activation are many times larger than the rest. Plain block integers (uniform.py) spread their steps
over such values and leave the others two or three steps. Here the minimum and the maximum of each block, its *spikes*,
travel as bfloat16 numbers of their own, with their positions in the block. The integers only have to cover the rest,
whose range is often ten times smaller. That is what makes 2 and 3 bits usable. The decoder computes the rest from the
integers, then writes the two spikes into their places. The price is metadata: two numbers, two positions, a span and an
offset a block, so blocks are larger, 64 values::

    span >= max(rest) - min(rest)        x' = low + q * span / (2**bits - 1)        spikes: themselves, in bfloat16

A block of 8 numbers at 2 bits. The spikes are 9 and -6; the rest lies within -0.4 and 0.7 and gets all four codes::

    >>> x = torch.tensor([0.3, -0.2, 0.7, 9.0, -0.4, 0.0, 0.5, -6.0])
    >>> payload = Spike(2, 8).encode(x)
    >>> join_planes([payload[:2]], 2).tolist()  # the spikes' codes are not used
    [2, 1, 3, 0, 0, 1, 2, 0]
    >>> [round(value, 2) for value in Spike(2, 8).decode_ref(payload, 8).tolist()]
    [0.4, -0.01, 0.82, 9.0, -0.43, -0.01, 0.4, -6.0]

At 2 bits the metadata would outweigh the codes, so it is compressed against what the decoder knows already, the
spikes: the span is an 8-bit float whose exponent counts down from that of the larger spike, and ``low`` is an 8-bit
multiple of ``span / 32`` counted from the point between the spikes that is nearest to zero. The paper leaves these
layouts open; they are ours.

The wire
--------
Sections for rows of ``ceil(width / block)`` blocks, a row's last one short where the block does not divide the width,
and ``ceil(width / 8)`` octets of codes, aligned as in planes.py::

    | planes of the codes | spike minima  | spike maxima  | spans       | lows        | planes of the positions |
    | octets * bits bytes | blocks x bf16 | blocks x bf16 | blocks x u8 | blocks x i8 | 2 * blocks codes        |

Positions take ``log2(block)`` bits, rounded up; a block's minimum and maximum follow each other. Bits per value, all
included::

    bits       2       3       4       5       6       7       8
    block 32   3.8125  4.8125  5.8125  6.8125  7.8125  8.8125  9.8125
    block 64   2.9375  3.9375  4.9375  5.9375  6.9375  7.9375  8.9375
    block 128  2.4844  3.4844  4.4844  5.4844  6.4844  7.4844  8.4844

With ``E`` the exponent of the larger magnitude of the two spikes::

    span = (1 + (c & 7) / 8) * 2**(E - 29 + (c >> 3))      c = 1..254, rounded up          c = 0: span 0
    low = anchor + i * span / 32                           i = -128..127, rounded down     anchor = 0 within the spikes

Two escapes: a spike that is NaN marks a block that held a NaN or an Inf and decodes to NaN; ``c = 255`` marks a
constant that bfloat16 cannot hold, whose float32 bits are ``minimum << 16 | maximum``.

Error of the rest: ``|x' - x| <= span / levels / 2``, where ``span <= 9/8 * max(32/31 * (max - min), 32/159 * (max -
anchor), (anchor - min) / 4, 2**-29 * 2**E)``, max and min being those of the rest; the second and third term matter
only where the rest is far from the anchor. Spikes are off by their rounding to bfloat16. float32 values beyond
bfloat16's largest number, 3.39e38, saturate as spikes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import ROUNDING, Codec
from .planes import (
    BFLOAT16_MAX,
    NAN_BITS,
    WIDTHS,
    finite_keys,
    from_blocks,
    from_half_words,
    from_high_half,
    from_ordered_keys,
    half_words,
    high_half,
    in_blocks,
    join_planes,
    join_sections,
    of_each_value,
    pack,
    plane_bytes,
    rows_of,
    split_planes,
    split_sections,
    unpack,
)
from .planes import ordered_keys as keys_of

CONSTANT = 255  # span code of a constant block in float32
LARGEST_SPAN = 254
SPAN_SHIFT = 20  # a span code counts float32 bit patterns in units of 2**20: eight steps per octave
OCTAVES = 29  # the smallest span lies this many octaves below the larger spike
UNITS = 32  # steps of `low` in a span


@dataclass(frozen=True)
class Spike(Codec):
    """Codec of ``bits``-bit integers whose block minimum and maximum travel as bfloat16."""

    bits: int
    block: int

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits={self.bits}: choose {WIDTHS[0]} to {WIDTHS[-1]}.")
        if self.block % 8 or not 8 <= self.block <= 256:
            raise ValueError(f"block={self.block}: choose a multiple of 8 up to 256, for example 32 or 64.")

    @property
    def native(self) -> tuple[int, int, int]:
        return 2, self.bits, self.block

    @property
    def levels(self) -> int:
        """Steps between the smallest and the largest code: 2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def position_bits(self) -> int:
        """Width of a position inside a block."""
        return (self.block - 1).bit_length()

    def section_bytes(self, numel: int, width: int | None = None) -> list[int]:
        rows, row = rows_of(numel, width)
        blocks = rows * math.ceil(row / self.block)
        codes, positions = (
            plane_bytes(rows * math.ceil(row / 8) * 8, self.bits),
            plane_bytes(2 * blocks, self.position_bits),
        )
        return [*codes, 2 * blocks, 2 * blocks, blocks, blocks, *positions]

    def encode_ref(self, x: Tensor, width: int | None = None) -> Tensor:
        row = rows_of(x.numel(), width)[1]
        blocks = in_blocks(x, self.block, row)
        keys = keys_of(blocks)
        positions = torch.stack([keys.argmin(1), keys.argmax(1)])  # the first of equals
        lowest, highest = (keys.gather(1, each[:, None])[:, 0] for each in positions)
        finite = finite_keys(lowest, highest, x.dtype)
        rest = self._extremes_of_rest(keys, positions, row)
        exact = [_values(key, finite, x.dtype) for key in (lowest, highest)]
        spikes = [each.bfloat16().float().clamp(-BFLOAT16_MAX, BFLOAT16_MAX) for each in exact]
        low, high = (_values(key, finite, x.dtype) for key in rest)

        prescale, anchor, exponent = _frame(*spikes)
        low, high = low * prescale, high * prescale
        spans = _span_codes(low, high, anchor, exponent)
        span = _spans(spans, exponent)
        lows = torch.where(span > 0, (low - anchor) / (span / UNITS), 0.0).floor().clamp(-128, 127)
        low = anchor + lows * (span / UNITS)
        inverse = torch.where(span > 0, 1.0 / self._step(span), 0.0)
        values = torch.where(finite[:, None], blocks.float(), 0.0) * prescale[:, None]
        codes = ((values - low[:, None]) * inverse[:, None]).round().clamp(0, self.levels).to(torch.uint8)
        codes.scatter_(1, positions.t(), 0)

        escaped = finite & (exact[0] == exact[1]) & (exact[0] != spikes[0])
        bits = exact[0].view(torch.int32)
        minima = torch.where(escaped, (bits >> 16) & 0xFFFF, torch.where(finite, high_half(spikes[0]), NAN_BITS))
        maxima = torch.where(escaped, bits & 0xFFFF, torch.where(finite, high_half(spikes[1]), NAN_BITS))
        return join_sections(
            [
                *pack(codes, row, self.bits),
                half_words(minima),
                half_words(maxima),
                torch.where(escaped, CONSTANT, spans).to(torch.uint8),
                lows.to(torch.int8).view(torch.uint8),
                *split_planes(positions.t().to(torch.uint8).flatten(), self.position_bits),
            ]
        )

    def decode_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        row = rows_of(numel, width)[1]
        sections = split_sections(payload, self.section_bytes(numel, width))
        planes = len(plane_bytes(numel, self.bits))
        codes = unpack(sections[:planes], self.bits, self.block, row)
        count = len(codes)
        minima, maxima, spans, lows = sections[planes : planes + 4]
        positions = join_planes(sections[planes + 4 :], self.position_bits)[: 2 * count].view(count, 2, 1).long()

        words = from_half_words(minima), from_half_words(maxima)
        minimum, maximum = (from_high_half(each) for each in words)
        prescale, anchor, exponent = _frame(minimum, maximum)
        span = _spans(spans.int(), exponent)
        low = anchor + lows.view(torch.int8).float() * (span / UNITS)
        values = (low[:, None] + codes.float() * self._step(span)[:, None]) / prescale[:, None]
        values.scatter_(1, positions[:, 1], maximum[:, None]).scatter_(1, positions[:, 0], minimum[:, None])
        values = torch.where(minimum.isnan()[:, None], math.nan, values)
        constant = (words[0] << 16 | words[1]).view(torch.float32)
        return from_blocks(torch.where((spans == CONSTANT)[:, None], constant[:, None], values), row)

    def bounds_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        """float32 [numel]: half a step, and what a spike's rounding to bfloat16 may take; zero for constants."""
        row = rows_of(numel, width)[1]
        sections = split_sections(payload, self.section_bytes(numel, width))
        minima, maxima, spans = sections[len(plane_bytes(numel, self.bits)) :][:3]
        minimum, maximum = (from_high_half(from_half_words(each)) for each in (minima, maxima))
        prescale, _, exponent = _frame(minimum, maximum)
        step = self._step(_spans(spans.int(), exponent))
        bound = step * ROUNDING / prescale + torch.maximum(minimum.abs(), maximum.abs()) * 2.0**-8
        return of_each_value(torch.where(spans == CONSTANT, 0.0, bound), self.block, row)

    def _step(self, span: Tensor) -> Tensor:
        """Distance of two codes' values; a scalar divisor is inverted on CUDA."""
        return span / torch.full_like(span, self.levels)

    def _extremes_of_rest(self, keys: Tensor, positions: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """Smallest and largest key of every block without its spikes and what fills it at the row's end. If nothing is
        left, the smaller spike twice."""
        spike = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, positions.t(), True)
        spike.view(-1, math.ceil(row / self.block) * self.block)[:, row:] = True
        limits = torch.iinfo(keys.dtype)
        low = keys.masked_fill(spike, limits.max).amin(1)
        high = keys.masked_fill(spike, limits.min).amax(1)
        empty, only = spike.all(1), keys.gather(1, positions[0][:, None])[:, 0]
        return torch.where(empty, only, low), torch.where(empty, only, high)


def _values(keys: Tensor, finite: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values of the keys, zero where not finite."""
    return from_ordered_keys(torch.where(finite, keys, 0), dtype).float()


def _frame(minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the spikes say about a block: power-of-two prescale that keeps the rest clear of float32's limits, and
    after it the anchor and the biased exponent E."""
    largest = torch.maximum(minimum.abs(), maximum.abs())
    prescale = torch.where(largest >= 2.0**112, 2.0**-16, torch.where(largest < 2.0**-64, 2.0**64, 1.0))
    anchor = (minimum.clamp(min=0) + maximum.clamp(max=0)) * prescale  # at most one of the two is not zero
    return prescale, anchor, (largest * prescale).view(torch.int32) >> 23


def _span_codes(low: Tensor, high: Tensor, anchor: Tensor, exponent: Tensor) -> Tensor:
    """Codes (int32) of the smallest spans that let `low` be reached from the anchor and `high` from `low`."""
    needed = (high - low) * (UNITS / (UNITS - 1))
    needed = torch.maximum(needed, (high - anchor) * (UNITS / (127 + UNITS)))
    needed = torch.maximum(needed, (anchor - low) * (UNITS / 128))
    above = needed.view(torch.int32) - ((exponent - OCTAVES) << 23)
    codes = ((above + (1 << SPAN_SHIFT) - 1) >> SPAN_SHIFT).clamp(1, LARGEST_SPAN)
    return torch.where((needed > 0) & (exponent > 0), codes, 0)


def _spans(codes: Tensor, exponent: Tensor) -> Tensor:
    """float32 spans of the codes; zero for code 0."""
    spans = (((exponent - OCTAVES) << 23) + (codes << SPAN_SHIFT)).view(torch.float32)
    return torch.where(codes > 0, spans, 0.0)
