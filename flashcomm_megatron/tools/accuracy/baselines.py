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
from ...codec.planes import join_planes, join_sections, plane_bytes, split_planes, split_sections


class Baseline(NamedTuple):
    """A format under the name the lab calls it."""

    widths: tuple[int, ...]
    codec: Callable[[int], Codec]


@dataclass(frozen=True)
class Symmetric(Codec):
    """Symmetric integers of ``bits`` with a float16 scale a block."""

    bits: int
    block: int = 32

    def section_bytes(self, numel: int) -> list[int]:
        return [*plane_bytes(numel, self.bits), 2 * math.ceil(numel / self.block)]

    def encode_ref(self, x: Tensor) -> Tensor:
        lowest = -(1 << (self.bits - 1))
        blocks = _blocks(x, self.block)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = (largest / lowest).half().float()
        scaled = torch.where(scale == 0, 0.0, blocks / torch.where(scale == 0, 1.0, scale))
        codes = (scaled.round().clamp(lowest, -lowest - 1) - lowest).to(torch.uint8)
        return join_sections(
            [*split_planes(codes.flatten()[: x.numel()], self.bits), scale.half().flatten().view(torch.uint8)]
        )

    def decode_ref(self, payload: Tensor, numel: int) -> Tensor:
        *planes, scales = split_sections(payload, self.section_bytes(numel))
        codes = _blocks(join_planes(planes, self.bits)[:numel], self.block) - (1 << (self.bits - 1))
        return (codes * scales.clone().view(torch.float16).float()[:, None]).flatten()[:numel]


@dataclass(frozen=True)
class Float8(Codec):
    """E4M3 floats with a float32 scale a block."""

    block: int = 128

    def section_bytes(self, numel: int) -> list[int]:
        return [numel, 4 * math.ceil(numel / self.block)]

    def encode_ref(self, x: Tensor) -> Tensor:
        blocks = _blocks(x, self.block)
        scale = blocks.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        values = (blocks / torch.where(scale == 0, 1.0, scale)).to(torch.float8_e4m3fn)
        return join_sections([values.view(torch.uint8).flatten()[: x.numel()], scale.flatten().view(torch.uint8)])

    def decode_ref(self, payload: Tensor, numel: int) -> Tensor:
        values, scales = split_sections(payload, self.section_bytes(numel))
        blocks = _blocks(values.clone().view(torch.float8_e4m3fn), self.block)
        return (blocks * scales.clone().view(torch.float32)[:, None]).flatten()[:numel]


def _blocks(x: Tensor, block: int) -> Tensor:
    """float32 [blocks, block] of a 1-D tensor; zeros fill the last block."""
    return torch.nn.functional.pad(x.float(), (0, -x.numel() % block)).view(-1, block)


BASELINES: dict[str, Baseline] = {
    "quickreduce": Baseline((4, 6), Symmetric),
    "fp8": Baseline((8,), lambda bits: Float8()),
}
