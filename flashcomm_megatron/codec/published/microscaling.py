"""Microscaling blocks (OCP MX specification v1.0), the format of Hansen-Palmus et al. (arXiv 2411.09510).

The idea
--------
This is the block format of the Open Compute Project, which new GPUs multiply natively. A block of 8, 16 or 32 values
shares one power-of-two scale X, one byte. Each value is a small float or integer P, its *element*, times X. Floats give
small values finer steps and large ones coarser steps, so one outlier costs the rest of its block less than with plain
integers. The scale is taken from the largest magnitude's exponent alone. Decoding is a table look-up and a shift::

    X = 2**(floor(log2(max |x|)) - emax)        P = nearest element to x / X, ties to even        x' = P * X

``emax`` is the exponent of the element's largest number. What exceeds that number saturates, as the specification's
section 6.3 has it: the largest values of a block can lose up to a quarter (E2M1) of their magnitude.

A block of 8 numbers as E2M1 (4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives). The largest magnitude 2.1 has the
exponent 1, emax is 2, so X is 0.5 and the elements are 0.5, -2, 1.5, 4, -1, 0, 3, -2::

    >>> x = torch.tensor([0.3, -1.2, 0.7, 2.1, -0.4, 0.0, 1.5, -0.9])
    >>> codec = Microscaling("e2m1", 8)
    >>> codec.decode_ref(codec.encode_ref(x), 8).tolist()
    [0.25, -1.0, 0.75, 2.0, -0.5, 0.0, 1.5, -1.0]

Elements
--------
Floats have a sign, e exponent bits of bias 2**(e-1) - 1 and m mantissa bits, with subnormals. Integers are two's
complement with bits - 2 fraction bits; the most negative one is not used, which keeps them symmetric (the
specification allows it). The specification defines E2M1, E2M3, E3M2, E4M3, E5M2 and INT8; E2M2, E3M1 and the narrower
integers follow the same rules, for the paper's 3.5x to 4.5x::

    element  INT3  E2M1  INT4  E2M2  E3M1  INT5  E2M3  E3M2  INT6  E4M3  E5M2   INT8
    bits     3     4     4     5     5     5     6     6     6     8     8      8
    emax     0     2     0     2     4     0     2     4     0     8     15     0
    largest  1.5   6     1.75  7     24    1.875 7.5   28    1.9375 448  57344  1.984375

E4M3 has a NaN and no Inf, E5M2 both, the others neither; none is ever sent.

The wire
--------
Planes of the element codes, then one E8M0 byte for every block (X = 2**(byte - 127)), sections aligned as in planes.py.
Rows are cut into blocks of their own; a row's last block is short where the block does not divide the width.
Bits per value: ``bits + 8 / block``. The byte 0xFF is the specification's NaN: a block that held a NaN or an Inf
decodes to NaN. A block of zeros has byte 0.

Error: P is the nearest element, so ``|x' - x| <= max(X * gap / 2, |x| - X * largest)``, gap being the distance of the
elements around x / X. A constant is exact only if the element has its mantissa: this is a format of someone else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..base import Codec
from ..planes import (
    extremes,
    from_blocks,
    in_blocks,
    join_sections,
    of_each_value,
    pack,
    plane_bytes,
    rows_of,
    split_sections,
    unpack,
)

BLOCKS = (8, 16, 32)
SCALE_BIAS = 127
NAN_SCALE = 0xFF


@dataclass(frozen=True)
class Element:
    """A number format of one value: ``exponent`` and ``mantissa`` bits beside the sign; exponent 0 is an integer."""

    exponent: int
    mantissa: int
    largest: float  # values beyond saturate to it

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def emax(self) -> int:
        """Exponent of the largest number."""
        return math.frexp(self.largest)[1] - 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number; below it, and for integers, steps are ``2**(emin - mantissa)``."""
        return 2 - (1 << (self.exponent - 1)) if self.exponent else 1

    def codes(self, x: Tensor) -> Tensor:
        """uint8 codes of the elements nearest to float32 ``x``, which must be finite; ties go to the even code."""
        magnitude = x.abs().clamp(max=self.largest)
        binade = ((magnitude.view(torch.int32) >> 23) - 127).clamp(min=self.emin)
        if self.exponent == 0:
            binade = torch.full_like(binade, self.emin)
        steps = (magnitude * _power_of_two(self.mantissa - binade)).round().int()
        code = ((binade - self.emin) << self.mantissa) + steps  # rounding up into the next binade carries by itself
        negative = (1 << self.bits) - code if self.exponent == 0 else code | 1 << (self.bits - 1)
        return (torch.where(x.signbit(), negative, code) & ((1 << self.bits) - 1)).to(torch.uint8)

    @cached_property
    def table(self) -> Tensor:
        """float32 values [2**bits] of all codes, by the specification's definition of each field."""
        half = 1 << (self.bits - 1)
        if self.exponent == 0:
            return torch.tensor([integer * 2.0 ** (2 - self.bits) for integer in (*range(half), *range(-half, 0))])
        positive = [self._positive(code) for code in range(half)]
        return torch.tensor([*positive, *(-value for value in positive)])

    def _positive(self, code: int) -> float:
        """Value of a float code without sign. E5M2 is the one IEEE format: its top exponent means Inf and NaN."""
        field, fraction = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
        unit = 2.0 ** (self.emin - self.mantissa)
        value = fraction * unit if field == 0 else ((1 << self.mantissa) + fraction) * unit * 2.0 ** (field - 1)
        if value <= self.largest:
            return value
        return math.inf if fraction == 0 else math.nan


ELEMENTS: dict[str, Element] = {
    "e2m1": Element(2, 1, 6.0),
    "e2m2": Element(2, 2, 7.0),
    "e3m1": Element(3, 1, 24.0),
    "e2m3": Element(2, 3, 7.5),
    "e3m2": Element(3, 2, 28.0),
    "e4m3": Element(4, 3, 448.0),
    "e5m2": Element(5, 2, 57344.0),
    **{f"int{bits}": Element(0, bits - 1, 2 - 2.0 ** (2 - bits)) for bits in (3, 4, 5, 6, 8)},
}


@dataclass(frozen=True)
class Microscaling(Codec):
    """Codec of ``element`` (a name in ELEMENTS) codes with one power-of-two scale for every ``block`` values."""

    element: str
    block: int

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise ValueError(f"element={self.element}: choose {', '.join(ELEMENTS)}.")
        if self.block not in BLOCKS:
            raise ValueError(f"block={self.block}: choose 8, 16 or 32 for microscaling.")

    def section_bytes(self, numel: int, width: int | None = None) -> list[int]:
        rows, row = rows_of(numel, width)
        octets = rows * math.ceil(row / 8)
        return [*plane_bytes(8 * octets, ELEMENTS[self.element].bits), rows * math.ceil(row / self.block)]

    def encode_ref(self, x: Tensor, width: int | None = None) -> Tensor:
        row = rows_of(x.numel(), width)[1]
        element, blocks = ELEMENTS[self.element], in_blocks(x, self.block, row)
        low, high, finite = extremes(blocks)
        exponent = (torch.maximum(low.abs(), high.abs()).view(torch.int32) >> 23) - 127  # -127: zero or subnormal
        scale = (exponent - element.emax).clamp(-SCALE_BIAS, SCALE_BIAS)
        values = torch.where(finite[:, None], blocks.float(), 0.0)
        codes = element.codes(_times_power_of_two(values, -scale[:, None]))
        scales = torch.where(finite, scale + SCALE_BIAS, NAN_SCALE).to(torch.uint8)
        return join_sections([*pack(codes, row, element.bits), scales])

    def decode_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        element, row = ELEMENTS[self.element], rows_of(numel, width)[1]
        *planes, scales = split_sections(payload, self.section_bytes(numel, width))
        codes = unpack(planes, element.bits, self.block, row)
        elements = element.table.to(payload.device)[codes.int()]
        scale = scales.int()[:, None]
        values = _times_power_of_two(elements, scale - SCALE_BIAS)
        return from_blocks(torch.where(scale == NAN_SCALE, math.nan, values), row)

    def bounds_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        """float32 [numel]: half the widest gap of the elements; more for the largest, to which values saturate."""
        element = ELEMENTS[self.element]
        beyond = 2.0 ** (element.emax + 1) - element.largest  # where the next scale begins
        scale = split_sections(payload, self.section_bytes(numel, width))[-1].int() - SCALE_BIAS
        unit = of_each_value(_power_of_two(scale), self.block, rows_of(numel, width)[1])
        is_largest = self.decode_ref(payload, numel, width).abs() == element.largest * unit
        return torch.where(is_largest, beyond, 2.0 ** (max(element.emin, element.emax) - element.mantissa - 1)) * unit


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32 2**exponent for int32 exponents from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


def _times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2**exponent for exponents from -254 to 254, without a power that float32 does not have as a normal number."""
    half = exponent >> 1
    return x * _power_of_two(half) * _power_of_two(exponent - half)
