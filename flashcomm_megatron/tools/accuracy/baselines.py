"""Number formats that others ship, as yardsticks of the lab: no recipes, so that nothing but the lab knows them.

quickreduce   AMD's QuickReduce, as in vLLM: blocks of 32, symmetric integers of 4 or 6 bits, a float16 scale a block.
              The scale maps a block's largest magnitude to the most negative code: -8 of -8..7, -32 of -32..31.
fp8           E4M3 floats, a float32 scale for every 128 values that maps the largest magnitude to 448.

Both go in two steps, as QuickReduce does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...codec.base import Codec
from ...codec.planes import from_blocks, join_sections, pack, plane_bytes, rows_of, split_sections, unpack


class Baseline(NamedTuple):
    """A format under the name the lab calls it."""

    widths: tuple[int, ...]
    codec: Callable[[int], Codec]


@dataclass(frozen=True)
class Symmetric(Codec):
    """Symmetric integers of ``bits`` with a float16 scale a block."""

    bits: int
    block: int = 32

    def section_bytes(self, numel: int, width: int | None = None) -> list[int]:
        rows, row = rows_of(numel, width)
        octets = rows * math.ceil(row / 8)
        return [*plane_bytes(8 * octets, self.bits), 2 * rows * math.ceil(row / self.block)]

    def encode_ref(self, x: Tensor, width: int | None = None) -> Tensor:
        lowest, row = -(1 << (self.bits - 1)), rows_of(x.numel(), width)[1]
        blocks = _blocks(x, self.block, row)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = (largest / lowest).half().float()
        scaled = torch.where(scale == 0, 0.0, blocks / torch.where(scale == 0, 1.0, scale))
        codes = (scaled.round().clamp(lowest, -lowest - 1) - lowest).to(torch.uint8)
        return join_sections([*pack(codes, row, self.bits), scale.half().flatten().view(torch.uint8)])

    def decode_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        row = rows_of(numel, width)[1]
        *planes, scales = split_sections(payload, self.section_bytes(numel, width))
        numbers = unpack(planes, self.bits, self.block, row).float() - (1 << (self.bits - 1))
        return from_blocks(numbers * scales.clone().view(torch.float16).float()[:, None], row)


@dataclass(frozen=True)
class Float8(Codec):
    """E4M3 floats with a float32 scale a block."""

    block: int = 128

    def section_bytes(self, numel: int, width: int | None = None) -> list[int]:
        rows, row = rows_of(numel, width)
        return [numel, 4 * rows * math.ceil(row / self.block)]

    def encode_ref(self, x: Tensor, width: int | None = None) -> Tensor:
        row = rows_of(x.numel(), width)[1]
        blocks = _blocks(x, self.block, row)
        scale = blocks.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        values = (blocks / torch.where(scale == 0, 1.0, scale)).to(torch.float8_e4m3fn)
        return join_sections([from_blocks(values.view(torch.uint8), row), scale.flatten().view(torch.uint8)])

    def decode_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        row = rows_of(numel, width)[1]
        values, scales = split_sections(payload, self.section_bytes(numel, width))
        blocks = _blocks(values.clone().view(torch.float8_e4m3fn), self.block, row)
        return from_blocks(blocks * scales.clone().view(torch.float32)[:, None], row)


def _blocks(x: Tensor, block: int, row: int) -> Tensor:
    """float32 [blocks, block] of a 1-D tensor; zeros fill each row's last block."""
    return torch.nn.functional.pad(x.float().view(-1, row), (0, -row % block)).view(-1, block)


BASELINES: dict[str, Baseline] = {
    "quickreduce": Baseline((4, 6), Symmetric),
    "fp8": Baseline((8,), lambda bits: Float8()),
}
