"""How numbers become bytes: rows and blocks, bit planes, aligned sections, bfloat16 as the upper half of float32.

A tensor is rows of ``width`` values, one row a token. **Every row is cut into blocks of its own**: where the block does
not divide the width, the last block of each row is short. So nothing on the wire holds values of two rows, and a row
decodes to the same bits whatever stands beside it. csrc/format/rows.h has the same rule in C++.

A payload is a sequence of *sections*, each starting on a 16-byte boundary, gaps zero. Codes of any width from 1 to 8
bits travel as *bit planes* of 8, 4, 2 or 1 bits, so that no code ever straddles a byte (bit splitting,
FlashCommunication V2, arXiv 2508.03760). The first plane holds the low bits of every code; inside a plane, values
follow each other from the least significant bit of a byte upwards: 4-bit plane, byte 0 = ``q[0] | q[1] << 4``. Eight
values are whole bytes in every plane, so codes are counted in octets, and each row's codes are padded to whole octets.

All arithmetic here is defined by bit patterns, never by a library's rounding or order of reduction, so that another
implementation can agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PLANES: dict[int, tuple[int, ...]] = {
    8: (8,),
    7: (4, 2, 1),
    6: (4, 2),
    5: (4, 1),
    4: (4,),
    3: (2, 1),
    2: (2,),
    1: (1,),
}
WIDTHS = range(2, 9)  # bits a user may ask for
SECTION_ALIGNMENT = 16  # bytes; one vector load of a GPU thread
BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
NAN_BITS = 0x7FC0  # the one NaN the formats write, as bfloat16


# ---- rows and blocks -------------------------------------------------------------------------------------------------


def rows_of(numel: int, width: int | None) -> tuple[int, int]:
    """Number of rows and values of a row. One row if ``width`` is None, or not less than ``numel``: a part of a row."""
    if width is None or width >= numel:
        return (1, numel) if numel else (0, 1)
    if width < 1 or numel % width:
        raise ValueError(
            f"width={width}: {numel} values are not whole rows of it; give the size of the last dimension."
        )
    return numel // width, width


def in_blocks(x: Tensor, block: int, row: int) -> Tensor:
    """[n] -> [blocks, block]; every row's last block is filled with the row's last value, which changes no extreme."""
    rows, missing = x.view(-1, row), -row % block
    if missing:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1)
    return rows.reshape(-1, block)


def from_blocks(blocks: Tensor, row: int) -> Tensor:
    """The way back: [blocks, block] -> [n]."""
    length = math.ceil(row / blocks.size(1)) * blocks.size(1)
    return blocks.reshape(-1, length)[:, :row].flatten()


def of_each_value(numbers: Tensor, block: int, row: int) -> Tensor:
    """One number for each block, [blocks] -> that of every value, [n]."""
    return from_blocks(numbers[:, None].expand(-1, block), row)


# ---- sections and planes ---------------------------------------------------------------------------------------------


def padded(size: int) -> int:
    """``size`` rounded up to a section boundary."""
    return math.ceil(size / SECTION_ALIGNMENT) * SECTION_ALIGNMENT


def plane_bytes(numel: int, bits: int) -> list[int]:
    """Unpadded length in bytes of each plane of ``numel`` codes."""
    return [math.ceil(numel / 8) * width for width in PLANES[bits]]


def join_sections(sections: Iterable[Tensor]) -> Tensor:
    """One payload (uint8) of the given uint8 sections."""
    return torch.cat([torch.nn.functional.pad(each, (0, padded(each.numel()) - each.numel())) for each in sections])


def split_sections(payload: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The sections of a payload, given their unpadded sizes in bytes."""
    sections, start = [], 0
    for size in sizes:
        sections.append(payload[start : start + size])
        start += padded(size)
    return sections


def split_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """uint8 codes [n] -> one packed section for each plane; codes missing in the last octet are zero."""
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 8))
    planes, shift = [], 0
    for width in PLANES[bits]:
        part = ((codes >> shift) & ((1 << width) - 1)).view(-1, 8 // width)
        offsets = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((part << offsets).sum(1, dtype=torch.uint8))
        shift += width
    return planes


def join_planes(planes: Sequence[Tensor], bits: int) -> Tensor:
    """Packed sections -> uint8 codes, a whole number of octets."""
    codes, shift = torch.zeros((), dtype=torch.uint8, device=planes[0].device), 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        offsets = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
        codes = codes | ((plane[:, None] >> offsets) & ((1 << width) - 1)).flatten() << shift
        shift += width
    return codes


def pack(codes: Tensor, row: int, bits: int) -> list[Tensor]:
    """uint8 codes [blocks, block] -> the sections of their planes, each row padded by zeros to whole octets."""
    rows = from_blocks(codes, row).view(-1, row)
    return split_planes(torch.nn.functional.pad(rows, (0, -row % 8)).flatten(), bits)


def unpack(planes: Sequence[Tensor], bits: int, block: int, row: int) -> Tensor:
    """The way back: uint8 codes [blocks, block], a row's last block filled as by :func:`in_blocks`."""
    rows = join_planes(planes, bits).view(-1, math.ceil(row / 8) * 8)[:, :row]
    return in_blocks(rows.flatten(), block, row)


def half_words(bits: Tensor) -> Tensor:
    """int32 in 0..65535 -> little-endian byte pairs."""
    return torch.stack([bits & 0xFF, (bits >> 8) & 0xFF], dim=1).to(torch.uint8).flatten()


def from_half_words(section: Tensor) -> Tensor:
    """Little-endian byte pairs -> int32 in 0..65535."""
    pairs = section.view(-1, 2).int()
    return pairs[:, 0] | (pairs[:, 1] << 8)


# ---- extremes and bfloat16 -------------------------------------------------------------------------------------------


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
