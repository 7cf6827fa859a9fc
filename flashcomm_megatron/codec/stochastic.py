"""Stochastic rounding: up or down at random so that the mean is the value itself; for gradients.

The idea
--------
Rounding to nearest loses a small gradient every time it is small; rounding up with the probability of the part that is
cut off loses it only on average over nothing. A codec of integers rounds ``steps`` (a value in units of its scale) as::

    q = floor(steps + u)        u uniform in [0, 1)        E[q] = steps

``u`` is no random stream. It is a hash of the element's index and of a checksum of the tensor itself, so the same
tensor is always encoded alike, in a recomputation as after a resume, with nothing to save and no generator to keep in
step; another tensor, on another rank or in the next step, gets another ``u``. Only encoding changes: payloads, their
layout and their decoding are those of the codec inside.

    h(v)      v ^= v >> 16;  v *= 0x7FEB352D;  v ^= v >> 15;  v *= 0x846CA68B;  v ^= v >> 16     (uint32)
    checksum  sum over i of h(bits of x[i] + 0x9E3779B9 * i)                                     (uint32)
    u[i]      (h(checksum ^ h(i)) >> 16) / 2**16

``bits`` are those of the tensor's own dtype. 16 bits of ``u`` are all that a float32 sum with a code below 256 keeps;
they bias a value by 2**-17 of its step.

Error: one step where rounding to nearest has half of one. A range that is not covered would be clipped, with a bias, so
a format's scale must let its codes reach every value of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import Reference

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
UNITS = 1 << 16  # values of u


@dataclass(frozen=True)
class Stochastic(Reference):
    """``codec``, Uniform or Rotated, with stochastic rounding. ValueError for a format that rounds to nearest only."""

    codec: Any  # rounds by rounded(); its encode_ref takes a dither

    def __post_init__(self) -> None:
        if not getattr(self.codec, "dithers", False):
            name = type(self.codec).__name__.lower()
            raise ValueError(
                f"grad-rounding stochastic: format {name} rounds to nearest; choose recipe auto, flash-v1."
            )

    @property
    def block(self) -> int:
        """Values that share metadata."""
        return int(self.codec.block)

    def section_bytes(self, numel: int) -> list[int]:
        """Unpadded length in bytes of every section of a payload of ``numel`` values."""
        return list(self.codec.section_bytes(numel))

    def encode_ref(self, x: Tensor) -> Tensor:
        """Payload of a contiguous, non-empty 1-D floating tensor."""
        payload: Tensor = self.codec.encode_ref(x, uniform(x, self.block))
        return payload

    def decode_ref(self, payload: Tensor, numel: int) -> Tensor:
        """float32 values [numel] of one payload."""
        return self.decode_sum([payload], torch.empty(numel, device=payload.device))

    def decode_sum(self, payloads: Sequence[Tensor], out: Tensor) -> Tensor:
        """Write the float32 sum, in the order given, of the decoded payloads into ``out``."""
        decoded: Tensor = self.codec.decode_sum(payloads, out)
        return decoded


def uniform(x: Tensor, block: int) -> Tensor:
    """``u`` of every value of ``x`` [n] in float32 [blocks, block]; of the last block's filling as well."""
    integer = {4: torch.int32, 2: torch.int16}[x.element_size()]
    length = x.numel() + -x.numel() % block
    index = torch.arange(length, device=x.device)
    bits = x.view(integer).long()
    checksum = _hash((bits + GOLDEN * index[: x.numel()]) & MASK).sum() & MASK
    return ((_hash(checksum ^ _hash(index)) >> 16).float() / UNITS).view(-1, block)


def rounded(steps: Tensor, dither: Tensor | None) -> Tensor:
    """Integers of float32 ``steps``: the nearest, ties to even, or ``floor(steps + dither)``."""
    return steps.round() if dither is None else (steps + dither).floor()


def _hash(v: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, held in int64, every output bit of which depends on every input bit."""
    v = v ^ (v >> 16)
    v = (v * 0x7FEB352D) & MASK
    v = v ^ (v >> 15)
    v = (v * 0x846CA68B) & MASK
    return v ^ (v >> 16)
