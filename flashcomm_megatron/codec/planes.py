"""How numbers become bytes: bit planes for the codes, little-endian words for the metadata, aligned sections.

A payload is a row of *sections*, each starting on a 16-byte boundary, gaps zero. Codes of any width from 1 to 8 bits
travel as *planes* of 8, 4, 2 or 1 bits, so that no code ever straddles a byte (bit splitting, FlashCommunication V2,
arXiv 2508.03760). The first plane holds the low bits of every code; inside a plane, values follow each other from the
least significant bit of a byte upwards: 4-bit plane, byte 0 = ``q[0] | q[1] << 4``. Eight values are whole bytes in
every plane, so codes are counted in octets.
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
SECTION_ALIGNMENT = 16  # bytes; one vector load of a GPU thread


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


def half_words(bits: Tensor) -> Tensor:
    """int32 in 0..65535 -> little-endian byte pairs."""
    return torch.stack([bits & 0xFF, (bits >> 8) & 0xFF], dim=1).to(torch.uint8).flatten()


def from_half_words(section: Tensor) -> Tensor:
    """Little-endian byte pairs -> int32 in 0..65535."""
    pairs = section.view(-1, 2).int()
    return pairs[:, 0] | (pairs[:, 1] << 8)
