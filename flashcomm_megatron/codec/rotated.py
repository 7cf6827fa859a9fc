"""Rotated block integers of 2 to 8 bits in half-bit steps: the format of recipe ``auto``.

The idea
--------
A few features of a transformer's activations are many times larger than the rest, and a scale that covers them leaves
the others two or three levels. So each block is multiplied by a Hadamard matrix before it is rounded. Each result, a
*coefficient*, is a sum of all values of the block with signs, so an outlier is spread evenly over the block, and no
coefficient is much larger than the others. Coefficients are close to a centred Gaussian whatever went in, so the format
needs no minimum: a block has one scale, and integers on both sides of zero. The decoder multiplies by the same matrix.
The scale fits in one byte: it counts down, in steps of an eighth of an octave, from the largest scale of 32 blocks, a
*super-block* (``SUPER_BLOCK``). Half-bit widths exist because two codes of 22 levels fit in 9 bits::

    c = H x / block        step = max|c| / zero        q = zero + round(+-c / step)        x' = H c'

with ``H`` the Hadamard matrix of ``block`` rows, ``levels`` codes 0 .. levels - 1 and ``zero = levels // 2``. The
sign is chosen so that the largest coefficient becomes code 0, which is the end of the range that reaches farther.

A block of 8 numbers at 4 bits (real blocks have 16 to 1024). Rounded plainly, the 9 would stretch the step to 0.64.
Rotated, the largest coefficient is 1.29, the step 1.29 / 8, rounded to 0.156; the sign makes the largest code 0::

    >>> x = torch.tensor([[0.3, -0.2, 0.7, 9.0, -0.4, 0.0, 0.5, -0.6]])
    >>> c = butterflies(x) / 8
    >>> [round(value, 2) for value in c[0].tolist()]
    [1.16, -0.89, -1.24, 0.91, 1.29, -1.06, -1.16, 1.29]
    >>> q = (8 + (c / -0.15625).round()).clamp(0, 15)
    >>> q[0].int().tolist()
    [1, 14, 15, 2, 0, 15, 15, 0]
    >>> [round(value, 2) for value in butterflies((q - 8) * -0.15625)[0].tolist()]
    [0.31, 0.0, 0.31, 8.75, -0.31, 0.0, 0.31, -0.62]

The wire
--------
Each row is cut into blocks of its own, ``ceil(width / block)``, the last one filled with the row's last value; so are
super-blocks. For a width where smaller blocks take fewer bytes they are used, down to 16 (``fitted``). Sections,
aligned as in planes.py::

    | planes of the codes             | scales      | tops               |
    | blocks * block * bits / 8 bytes | blocks x u8 | super-blocks x u16 |

    bits    2   2.5   3   3.5   4   4.5   5   5.5   6   6.5   7   7.5   8
    levels  4   5     8   11    16  22    32  45    64  90    128 181   256

Whole widths travel as planes of codes. A width with a half travels as pairs: ``q[2i] + q[2i + 1] * levels`` is one
integer of ``2 * bits`` bits (22 * 22 <= 512), whose low eight bits are one plane and whose other bits follow as planes
of their own. With block 32, metadata are 0.266 bits a value.

A step is a float32 with three mantissa bits, rounded to nearest (beyond 32 levels up, lest the largest coefficient lose
many steps), known by ``key = float32 bits >> 20``. Up to 16 levels two smaller keys are tried as well, and the one of
least squared error is taken: with few codes a finer grid for all is often worth cutting the largest. Errors are
compared as integers, in eighths of a step, so that the order of summation does not matter.

``top`` is the largest key of 32 blocks, ``scale = negative << 7 | d`` the block's own: ``key = top - d``. A block whose
step would lie more than 125 eighths of an octave below the largest takes ``d = 125``. Steps are at least 2**-100: a
block far below decodes to zeros. ``negative``, the step's sign bit, is set when the step is negative.
Two values of ``scale`` are escapes:

- 127: the block held a NaN or an Inf and decodes to NaN.
- 126: the block is a constant, exact at every width: its float32 bits lie in the low bits of the codes, one a code
  (block 16: two), lowest first.

Sums are taken over coefficients, in rank order, and rotated back once. The butterflies are float32 additions in one
fixed order, strides 1, 2, 4, ..., (a, b) -> (a + b, a - b); every product is by a power of two or exact and no
decoded coefficient is -0, so that all implementations agree bit for bit, also those that rotate one payload's codes as
integers.

The residual
------------
Residual feedback (feedback.py) adds the rounding error of one encoding to the next one. Only the next encoding of a
tensor with the same codec and shape reads it, so it is kept where rounding happens, as coefficients, and nothing is
rotated back. With ``h = H x = block * c``::

    h' = h + residual        q as above, of h'        residual = h' - q * step * block

The product is exact and ``q`` is never -0. Numbers have the tensor's dtype and are finite: float16 is rounded and
clamped, bfloat16 is truncated to the upper half of a float32. A block of NaN, Inf, an exact constant (of ``h'``) or
values from 2**100 on leaves zeros; the last ones are encoded without a residual. The layout is that of 512-bit vectors:
four blocks of a row together, the first four coefficients of each, then their next four, to the last. A row's blocks
are padded to a multiple of four.

Error: a coefficient is off by at most ``step / 2``, or by what it lies beyond the first or last code's value. ``step``
is ``max|c| / zero`` within -1/17 and +1/16, beyond 32 levels within +1/8, unless one of the floors above is larger; up
to 16 levels it may be 4/5 of that, with fewer than 8 levels 2/3. A value is off by at most the sum of its block's
coefficients' errors, and the squared errors of a block sum to ``block`` times those of its coefficients. With a
residual all this is the error of ``h'``, so that errors of calls telescope: what the sum of all that was decoded lacks
of the sum of all values is the last residual, ``H residual / block``, and what truncating and clamping took before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .base import Codec, rounded
from .planes import (
    PLANES,
    WIDTHS,
    from_blocks,
    from_half_words,
    half_words,
    high_half_value,
    in_blocks,
    join_planes,
    join_sections,
    of_each_value,
    plane_bytes,
    rows_of,
    split_planes,
    split_sections,
)
from .rotated_steps import KEY_SHIFT, LEAST_KEY, NEAREST, SEARCHED, best_keys, steps_off

LEVELS = {half / 2: math.isqrt(2**half) for half in range(2 * WIDTHS[0], 2 * WIDTHS[-1] + 1)}  # as many as fit
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
SUPER_BLOCK = 32  # blocks that share a top
GROUP = 4  # blocks whose numbers are interleaved in a residual
NAN, CONSTANT, LAST = 127, 126, 125  # of the scale byte without its sign; LAST is the largest distance from the top
HUGE = 2.0**100  # from here on butterflies could overflow: shrink first
SHRINK = 2.0**-16


@dataclass(frozen=True)
class Rotated(Codec):
    """Codec of Hadamard-rotated blocks: ``bits`` a coefficient (2 to 8 in steps of one half), one byte a block."""

    bits: float
    block: int
    keeps_residuals = True
    super_block = SUPER_BLOCK

    def __post_init__(self) -> None:
        if self.bits not in LEVELS:
            raise ValueError(f"bits={self.bits}: choose {WIDTHS[0]} to {WIDTHS[-1]} in steps of 0.5.")
        if self.block not in BLOCKS:
            raise ValueError(f"block={self.block}: a rotated block is a power of two; choose {BLOCKS}.")

    @property
    def native(self) -> tuple[int, int, int]:
        """Format number in csrc/api.h, twice the bits, and block: how the compiled extension knows this codec."""
        return 1, int(2 * self.bits), self.block

    @property
    def levels(self) -> int:
        """Number of codes."""
        return LEVELS[self.bits]

    @property
    def zero(self) -> int:
        """The code of a coefficient that is zero."""
        return self.levels // 2

    def fitted(self, width: int) -> Rotated:
        """This codec, or the one with smaller blocks that takes the fewest bytes for a row of ``width`` values."""
        return _fitted(self, width)

    def without_kernel(self, dtype: torch.dtype, numel: int, width: int) -> str:
        """A super-block must fit into a tile, a row end where blocks and a thread's 32 values do (rowed_codec.h)."""
        fitted = self.fitted(width)
        if fitted.unit * dtype.itemsize > 1 << 14:
            return f"blocks of {fitted.block} {str(dtype).removeprefix('torch.')} values"
        if numel <= width or width % fitted.unit == 0:
            return ""
        if width % max(fitted.block, 32):
            return f"rows of {width} values"
        return f"rows of {width} values, more than 2**30 in all" if numel > 1 << 30 else ""

    def section_bytes(self, numel: int, width: int | None = None) -> list[int]:
        fitted = self.fitted(width or numel)
        rows, row = rows_of(numel, width)
        blocks, words = fitted._shape(row)
        planes = [size for width in self._widths for size in plane_bytes(rows * words, width)]
        return [*planes, rows * blocks, 2 * rows * math.ceil(blocks / SUPER_BLOCK)]

    def residual_numel(self, numel: int, width: int | None = None) -> int:
        group = GROUP * self.fitted(width or numel).block
        rows, row = rows_of(numel, width)
        return rows * math.ceil(row / group) * group

    def encode_ref(self, x: Tensor, width: int | None = None) -> Tensor:
        return self.fitted(width or x.numel())._encode(x, None, rows_of(x.numel(), width)[1])

    def encode_residual_ref(self, x: Tensor, residual: Tensor, width: int | None = None) -> Tensor:
        """The same of ``x + residual``; the residual is replaced by the new rounding error."""
        return self.fitted(width or x.numel())._encode(x, residual, rows_of(x.numel(), width)[1])

    def decode_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        return self.decode_sum_ref([payload], numel, torch.float32, width)

    def decode_sum_ref(
        self, payloads: Sequence[Tensor], numel: int, dtype: torch.dtype, width: int | None = None
    ) -> Tensor:
        """What :meth:`decode_sum` does: one payload is limited to the finite range of ``dtype``; a sum may overflow."""
        if numel == 0:
            return torch.empty(0, dtype=dtype, device=payloads[0].device)
        fitted, row, sizes = self.fitted(width or numel), rows_of(numel, width)[1], self.section_bytes(numel, width)
        parts = [fitted._coefficients(payload, sizes, fitted._shape(row)[0]) for payload in payloads]
        largest = torch.stack([size for _, size in parts]).amax(0)
        shrink = torch.where(largest >= HUGE, SHRINK, 1.0)[:, None]
        total = parts[0][0] * shrink
        for coefficients, _ in parts[1:]:
            total = total + coefficients * shrink
        values = from_blocks(butterflies(total) / shrink, row)
        if len(payloads) == 1:
            limit = torch.finfo(dtype).max
            values = values.clamp(-limit, limit)
        return rounded(values, dtype, self.bound_of_sum(payloads, numel, dtype, width))

    def bounds_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        """float32 [numel]: what the errors of a block's coefficients sum to at most; zero for constants."""
        fitted, row = self.fitted(width or numel), rows_of(numel, width)[1]
        *_, scales, tops = split_sections(payload, self.section_bytes(numel, width))
        step, distance = fitted._steps(scales, tops, fitted._shape(row)[0])
        bound = torch.where(distance == CONSTANT, 0.0, step * (fitted.block * steps_off(self.levels)))
        return of_each_value(bound, fitted.block, row)

    # ---- the definition, for blocks that fit the rows ------------------------------------------------------------

    def _shape(self, row: int) -> tuple[int, int]:
        """Blocks of a row, and the words of its codes."""
        blocks = math.ceil(row / self.block)
        return blocks, blocks * self.block // self._codes_per_word

    def _encode(self, x: Tensor, residual: Tensor | None, row: int) -> Tensor:
        values = in_blocks(x, self.block, row).float()
        blocks = self._shape(row)[0]  # of a row
        finite = values.isfinite().all(1)
        values = torch.where(finite[:, None], values, 0.0)
        shrink = torch.where(values.abs().amax(1) >= HUGE, SHRINK, 1.0)
        coefficients = butterflies(values * shrink[:, None])
        if residual is not None:
            repaid = coefficients + _ungrouped(residual, self.block, blocks)
            coefficients = torch.where((shrink == 1)[:, None], repaid, coefficients)
            finite = finite & coefficients.isfinite().all(1)

        constant = finite & (coefficients[:, 1:] == 0).all(1)
        value = coefficients[:, 0] / (self.block * shrink)
        regular = finite & ~constant
        coefficients = torch.where(regular[:, None], coefficients, 0.0)
        scales, tops, step = self._scales(coefficients, shrink, regular, blocks)
        inverse = 1.0 / (step * shrink * self.block)
        numbers = (coefficients * inverse[:, None]).round().clamp(-self.zero, self.levels - 1 - self.zero)
        numbers += 0.0  # never -0
        if residual is not None:
            lost = coefficients - numbers * (step * self.block)[:, None]
            lost = torch.where((regular & (shrink == 1))[:, None], lost, 0.0)
            residual.copy_(_grouped(lost, residual.dtype, blocks))

        codes = (numbers + self.zero).to(torch.uint8)
        codes = torch.where(constant[:, None], self._constant_codes(value), codes)
        codes = torch.where(finite[:, None], codes, 0)
        scales = torch.where(finite, torch.where(constant, CONSTANT, scales), NAN)
        return join_sections([*self._split(codes.flatten()), scales.to(torch.uint8), half_words(tops)])

    def _scales(
        self, coefficients: Tensor, shrink: Tensor, regular: Tensor, blocks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale bytes and tops as int32, and the signed steps float32, of rows of ``blocks`` blocks."""
        low, high = coefficients.amin(1), coefficients.amax(1)
        negative = high > -low
        largest = torch.maximum(high, -low)
        needed = largest * (1.0 / torch.full_like(largest, self.block * self.zero))  # the divisor's inverse, in float32
        half = 1 << (KEY_SHIFT - 1)
        keys = (needed.view(torch.int32) + (half if self.levels <= NEAREST else 2 * half - 1)) >> KEY_SHIFT
        keys = (keys + (shrink < 1).int() * (16 << 3)).clamp(min=LEAST_KEY)
        if self.levels <= SEARCHED:
            keys = best_keys(keys, coefficients, torch.where(negative, -shrink, shrink) * self.block, self.levels)
        counted = keys.masked_fill(~regular, LEAST_KEY).view(-1, blocks)
        counted = torch.nn.functional.pad(counted, (0, -blocks % SUPER_BLOCK), value=LEAST_KEY)
        tops = counted.view(-1, SUPER_BLOCK).amax(1)
        top = _of_each_block(tops, blocks)
        distance = (top - keys).clamp(0, LAST)
        step = ((top - distance) << KEY_SHIFT).view(torch.float32)
        return distance | negative.int() * 0x80, tops, torch.where(negative, -step, step)

    def _coefficients(self, payload: Tensor, sizes: Sequence[int], blocks: int) -> tuple[Tensor, Tensor]:
        """float32 coefficients [all blocks, block] of one payload; the magnitude of each block's step or constant."""
        *planes, scales, tops = split_sections(payload, sizes)
        codes = self._join(planes).view(-1, self.block).int()
        step, distance = self._steps(scales, tops, blocks)
        coefficients = (codes - self.zero) * torch.where(scales > 0x7F, -step, step)[:, None] + 0.0  # never -0

        value = self._constant_values(codes)
        constant = distance == CONSTANT
        spike = torch.zeros_like(coefficients)
        spike[:, 0] = value
        size = torch.where(constant, value.abs(), step)
        return torch.where(constant[:, None], spike, coefficients), size

    @staticmethod
    def _steps(scales: Tensor, tops: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """Magnitude of every block's step, float32, NaN where its values are; and its distance from the top."""
        distance, top = scales.int() & 0x7F, _of_each_block(from_half_words(tops), blocks)
        step = ((top - distance.clamp(max=LAST)) << KEY_SHIFT).view(torch.float32)
        return torch.where(distance == NAN, math.nan, step), distance

    # ---- codes and planes ----------------------------------------------------------------------------------

    @property
    def _codes_per_word(self) -> int:
        """Codes that make one integer on the wire."""
        return 1 if self.bits == int(self.bits) else 2

    @property
    def _widths(self) -> list[int]:
        """Bits of that integer, cut at a byte."""
        width = int(self.bits * self._codes_per_word)
        return [min(width, 8), width - 8] if width > 8 else [width]

    def _split(self, codes: Tensor) -> list[Tensor]:
        """uint8 codes -> the sections of their planes."""
        words = codes.int()
        if self._codes_per_word == 2:
            words = words[0::2] + words[1::2] * self.levels
        planes = split_planes((words & 0xFF).to(torch.uint8), self._widths[0])
        for width in self._widths[1:]:
            planes += split_planes((words >> 8).to(torch.uint8), width)
        return planes

    def _join(self, planes: Sequence[Tensor]) -> Tensor:
        """The sections of planes -> uint8 codes."""
        count = len(PLANES[self._widths[0]])
        words = join_planes(planes[:count], self._widths[0]).int()
        for width in self._widths[1:]:
            words |= join_planes(planes[count:], width).int() << 8
        if self._codes_per_word == 2:
            words = torch.stack([words % self.levels, words // self.levels], dim=1)
        return words.flatten().to(torch.uint8)

    def _constant_codes(self, value: Tensor) -> Tensor:
        """uint8 codes [blocks, block] that hold the bits of float32 ``value`` [blocks]."""
        width = max(1, 32 // self.block)
        shifts = torch.arange(0, 32, width, device=value.device)
        codes = (value.view(torch.int32).long()[:, None] >> shifts) & ((1 << width) - 1)
        return torch.nn.functional.pad(codes, (0, self.block - codes.size(1))).to(torch.uint8)

    def _constant_values(self, codes: Tensor) -> Tensor:
        """float32 [blocks] of codes [blocks, block] that hold a constant."""
        width = max(1, 32 // self.block)
        shifts = torch.arange(0, 32, width, device=codes.device)
        bits = ((codes[:, : 32 // width].long() & ((1 << width) - 1)) << shifts).sum(1)
        return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)


def butterflies(x: Tensor) -> Tensor:
    """Unnormalized Walsh-Hadamard transform of every row of float32 [rows, 2**k]; twice is ``2**k`` times the input."""
    rows, length = x.shape
    stride = 1
    while stride < length:
        pairs = x.view(rows, -1, 2, stride)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack([first + second, first - second], dim=2).view(rows, length)
        stride *= 2
    return x


@lru_cache(1024)
def _fitted(codec: Rotated, width: int) -> Rotated:
    """Of the codecs with blocks up to ``codec``'s, the one of fewest bits for a row; of equals, the larger block."""

    def bits(block: int) -> float:
        blocks = math.ceil(width / block)
        return blocks * (block * codec.bits + 8) + 16 * math.ceil(blocks / SUPER_BLOCK)

    block = min((block for block in reversed(BLOCKS) if block <= codec.block), key=bits)
    return codec if block == codec.block else replace(codec, block=block)


def _of_each_block(tops: Tensor, blocks: int) -> Tensor:
    """The top of every block, of rows of ``blocks`` blocks."""
    super_blocks = math.ceil(blocks / SUPER_BLOCK)
    return tops.view(-1, super_blocks).repeat_interleave(SUPER_BLOCK, dim=1)[:, :blocks].flatten()


def _ungrouped(residual: Tensor, block: int, blocks: int) -> Tensor:
    """Numbers of a residual -> float32 [all blocks, block], of rows of ``blocks`` blocks."""
    numbers = residual.view(-1, block // 4, GROUP, 4).transpose(1, 2).reshape(-1, block).float()
    return numbers.view(-1, math.ceil(blocks / GROUP) * GROUP, block)[:, :blocks].reshape(-1, block)


def _grouped(lost: Tensor, dtype: torch.dtype, blocks: int) -> Tensor:
    """The way back, zeros for blocks that are missing; rounded to ``dtype`` as the module docstring has it."""
    limit, block = torch.finfo(dtype).max, lost.size(1)
    lost = (high_half_value(lost) if dtype == torch.bfloat16 else lost.clamp(-limit, limit)).to(dtype)
    lost = torch.nn.functional.pad(lost.view(-1, blocks, block), (0, 0, 0, -blocks % GROUP))
    return lost.reshape(-1, GROUP, block // 4, 4).transpose(1, 2).flatten()
