"""Asymmetric block integers of 2 to 8 bits: the format of Flash Communication (arXiv 2412.04964, section 3).

The idea
--------
A tensor is cut into blocks of ``block`` values. Each block travels as a minimum, a scale and one small integer
per value::

    scale = (max - min) / (2**bits - 1)        q = round((x - min) / scale)        x' = min + q * scale

Sending the minimum instead of a rounded zero point keeps blocks that do not straddle zero exact to half a
step (a zero point clamped into the integer range is off by the whole offset), and makes constants exact.

The wire
--------
One payload for ``n`` values. ``n8`` is ``n`` rounded up to 8, ``blocks`` is ``ceil(n / block)``; every section
starts on a 16-byte boundary, gaps are zero::

    | 8-, 4-, 2-, 1-bit planes ...        | scales         | minima         |
    | n8 * w / 8 bytes for each plane w   | blocks x bf16  | blocks x bf16  |

    bits    8  7      6    5    4  3    2
    planes  8  4+2+1  4+2  4+1  4  2+1  2       the first plane holds the low bits of every code

Inside a plane, values follow each other from the least significant bit of a byte upwards: 4-bit plane, byte 0 =
``q[0] | q[1] << 4``. Eight values are always whole bytes in every plane, so odd widths cost no bit twiddling.

Metadata is bfloat16 whatever the tensor's dtype, so a payload's size depends on ``n`` alone and it can be
decoded to any dtype. The minimum is rounded down and the scale up, so every value of the block lies in
``[min, min + levels * scale]`` and the error is at most half a scale. Two escapes use codes the pair cannot
otherwise take:

- scale = NaN: the block held a NaN or an Inf and decodes to NaN.
- scale with its sign bit set: the block is a constant that bfloat16 cannot hold. Its float32 bits are
  ``min << 16 | (scale & 0x7fff) << 1 | (q & 1)``.

Error: ``|x' - x| <= scale / 2`` plus the rounding to the output dtype, where
``scale <= (max - min + 2**-7 |min|) / levels * (1 + 2**-7)`` (without the ``|min|`` term when ``min`` is a
bfloat16 number). float32 values beyond bfloat16's largest number, 3.39e38, saturate.

This file is the definition in torch; ``csrc/codec.h`` is the same definition in C++ and CUDA, equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import extension

PLANES: dict[int, tuple[int, ...]] = {
    8: (8,),
    7: (4, 2, 1),
    6: (4, 2),
    5: (4, 1),
    4: (4,),
    3: (2, 1),
    2: (2,),
}
SECTION_ALIGNMENT = 16  # bytes; one vector load of a GPU thread
BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
HUGE = 2.0**118  # scales from here on could overflow float32 in min + q * scale: halve first
TINY = 2.0**-100  # scales below have a reciprocal beyond float32: scale up first
NAN_BITS = 0x7FC0  # the one NaN the format writes, as bfloat16


@dataclass(frozen=True)
class Uniform:
    """Codec of asymmetric integers: ``bits`` per value, one bfloat16 scale and minimum per ``block`` values."""

    bits: int
    block: int

    def __post_init__(self) -> None:
        if self.bits not in PLANES:
            raise ValueError(f"bits={self.bits}: choose 2 to 8.")
        if self.block < 8 or self.block % 8:
            raise ValueError(f"block={self.block}: choose a multiple of 8, for example 32, 64 or 128.")

    @property
    def levels(self) -> int:
        """Steps between the smallest and the largest code: 2**bits - 1."""
        return 2**self.bits - 1

    def section_bytes(self, numel: int) -> list[int]:
        """Unpadded length in bytes of every section of a payload of ``numel`` values."""
        octets, blocks = math.ceil(numel / 8), math.ceil(numel / self.block)
        return [octets * width for width in PLANES[self.bits]] + [2 * blocks, 2 * blocks]

    def wire_bytes(self, numel: int) -> int:
        """Length in bytes of the payload of ``numel`` values."""
        return sum(_padded(size) for size in self.section_bytes(numel))

    def encode(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Encode a contiguous 1-D floating tensor into a uint8 payload of ``wire_bytes(x.numel())``."""
        if out is None:
            out = torch.empty(self.wire_bytes(x.numel()), dtype=torch.uint8, device=x.device)
        if not extension.encode(self, x, out):
            out.copy_(self.encode_ref(x))
        return out

    def decode_sum(self, payloads: Sequence[Tensor], out: Tensor) -> Tensor:
        """Write the float32 sum, in the order given, of the decoded payloads into ``out`` (1-D, any float dtype).

        With one payload this is plain decoding. Every part is limited to the finite range of ``out.dtype``;
        the sum may overflow to Inf as an exact sum would.
        """
        if not extension.decode_sum(self, payloads, out):
            out.copy_(self.decode_sum_ref(payloads, out.numel(), out.dtype))
        return out

    # ---- the definition ------------------------------------------------------------------------------------

    def encode_ref(self, x: Tensor) -> Tensor:
        """What :meth:`encode` does, in torch."""
        numel = x.numel()
        if numel == 0:
            return torch.empty(0, dtype=torch.uint8, device=x.device)
        blocks = _in_blocks(x, self.block)
        low, high, finite = _extremes(blocks)
        values = blocks.float()
        minimum = _round_down(low)
        scale, prescale, inverse = self._scale(minimum, high)
        scaled = (values * prescale[:, None] - (minimum * prescale)[:, None]) * inverse[:, None]
        codes = torch.where(finite[:, None], scaled, 0.0).round().clamp(min=0).to(torch.uint8)

        minimum_bits, scale_bits = _high_half(minimum), _high_half(scale)
        bits = low.view(torch.int32)
        escaped = finite & (low == high) & (minimum != low)
        codes = torch.where(escaped[:, None], (bits & 1)[:, None].to(torch.uint8), codes)
        minimum_bits = torch.where(escaped, bits >> 16, minimum_bits)
        scale_bits = torch.where(escaped, 0x8000 | ((bits >> 1) & 0x7FFF), scale_bits)
        minimum_bits = torch.where(finite, minimum_bits, NAN_BITS)
        scale_bits = torch.where(finite, scale_bits, NAN_BITS)

        codes = codes.flatten()[: math.ceil(numel / 8) * 8]
        codes[numel:] = 0
        sections = [*_split_planes(codes, self.bits), _half_words(scale_bits), _half_words(minimum_bits)]
        return torch.cat([_pad(section) for section in sections])

    def decode_sum_ref(self, payloads: Sequence[Tensor], numel: int, dtype: torch.dtype) -> Tensor:
        """What :meth:`decode_sum` does, in torch."""
        total = self._decode_ref(payloads[0], numel, dtype)
        for payload in payloads[1:]:
            total = total + self._decode_ref(payload, numel, dtype)
        return torch.where(total.isnan(), math.nan, total).to(dtype)

    def _scale(self, minimum: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per block: scale, power-of-two prescale, and the reciprocal of the prescaled scale."""
        halve = torch.where(high * 0.5 - minimum * 0.5 >= 2.0**126, 0.5, 1.0)  # max - min overflows float32
        spread = (high * halve - minimum * halve).clamp(min=0)
        scale = _high_half_value(spread / self.levels)
        scale = torch.where(scale * self.levels < spread, _next_up(scale), scale) / halve
        prescale = torch.where((scale > 0) & (scale < TINY), 2.0**64, halve)
        return scale, prescale, torch.where(scale > 0, 1.0 / (scale * prescale), 0.0)

    def _decode_ref(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """float32 values of one payload."""
        if numel == 0:
            return torch.empty(0, dtype=torch.float32, device=payload.device)
        *planes, scales, minima = self._sections(payload, numel)
        codes = _join_planes(planes, self.bits)
        blocks = scales.numel() // 2
        codes = torch.nn.functional.pad(codes, (0, blocks * self.block - codes.numel())).view(blocks, self.block)
        scale_bits, minimum_bits = _from_half_words(scales), _from_half_words(minima)
        scale, minimum = _from_high_half(scale_bits), _from_high_half(minimum_bits)

        halve = torch.where(scale >= HUGE, 0.5, 1.0)
        limit = torch.finfo(dtype).max * halve[:, None]
        values = (minimum * halve)[:, None] + codes.float() * (scale * halve)[:, None]
        values = values.clamp(-limit, limit) / halve[:, None]

        constant = (minimum_bits << 16) | ((scale_bits & 0x7FFF) << 1)
        constant_values = (constant[:, None] | (codes.int() & 1)).view(torch.float32)
        escaped = ((scale_bits & 0x8000) != 0)[:, None]
        values = torch.where(escaped, constant_values, values)
        values = torch.where(scale.isnan()[:, None] & ~escaped, math.nan, values)
        return values.flatten()[:numel]

    def _sections(self, payload: Tensor, numel: int) -> list[Tensor]:
        sections, start = [], 0
        for size in self.section_bytes(numel):
            sections.append(payload[start : start + size])
            start += _padded(size)
        return sections


def _padded(size: int) -> int:
    return math.ceil(size / SECTION_ALIGNMENT) * SECTION_ALIGNMENT


def _pad(section: Tensor) -> Tensor:
    return torch.nn.functional.pad(section, (0, _padded(section.numel()) - section.numel()))


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """[n] -> [blocks, block]; the last block is filled with its last value, which changes no extreme."""
    missing = -x.numel() % block
    return torch.cat([x, x[-1:].expand(missing)]).view(-1, block)


def _extremes(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest value of every row as float32, and whether the row is finite.

    The order is that of the bit patterns (-0 below +0, NaN outermost), the one order in which a minimum does not
    depend on who computes it.
    """
    integer, sign_shift, mask = {4: (torch.int32, 31, 0x7FFFFFFF), 2: (torch.int16, 15, 0x7FFF)}[blocks.element_size()]
    keys = blocks.view(integer)
    keys = keys ^ ((keys >> sign_shift) & mask)
    low, high = keys.amin(1), keys.amax(1)
    infinity = torch.tensor(math.inf, dtype=blocks.dtype).view(integer).item()
    finite = (high < infinity) & (low > ~infinity)

    def value(key: Tensor) -> Tensor:
        return torch.where(finite, key ^ ((key >> sign_shift) & mask), 0).to(integer).view(blocks.dtype).float()

    return value(low), value(high), finite


def _high_half_value(x: Tensor) -> Tensor:
    """float32 rounded toward zero to a bfloat16 number, kept as float32."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32)


def _next_up(x: Tensor) -> Tensor:
    """The bfloat16 number next farther from zero, kept as float32."""
    return (x.view(torch.int32) + 0x10000).view(torch.float32)


def _round_down(x: Tensor) -> Tensor:
    """float32 rounded toward minus infinity to a finite bfloat16 number, kept as float32."""
    truncated = _high_half_value(x)
    return torch.where(truncated > x, _next_up(truncated), truncated).clamp(min=-BFLOAT16_MAX)


def _high_half(x: Tensor) -> Tensor:
    """Upper 16 bits of float32 as int32 in 0..65535."""
    return (x.view(torch.int32) >> 16) & 0xFFFF


def _from_high_half(bits: Tensor) -> Tensor:
    return (bits << 16).view(torch.float32)


def _half_words(bits: Tensor) -> Tensor:
    """int32 in 0..65535 -> little-endian byte pairs."""
    return torch.stack([bits & 0xFF, (bits >> 8) & 0xFF], dim=1).to(torch.uint8).flatten()


def _from_half_words(section: Tensor) -> Tensor:
    pairs = section.view(-1, 2).int()
    return pairs[:, 0] | (pairs[:, 1] << 8)


def _split_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """uint8 codes [n8] -> one packed section for each plane."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        part = ((codes >> shift) & (2**width - 1)).view(-1, 8 // width)
        offsets = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((part << offsets).sum(1, dtype=torch.uint8))
        shift += width
    return planes


def _join_planes(planes: Sequence[Tensor], bits: int) -> Tensor:
    """Packed sections -> uint8 codes [n8]."""
    codes, shift = None, 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        offsets = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
        part = ((plane[:, None] >> offsets) & (2**width - 1)).flatten() << shift
        codes = part if codes is None else codes | part
        shift += width
    assert codes is not None
    return codes
