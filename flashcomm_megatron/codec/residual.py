"""Encoding with a memory: what a rounding lost is added to the next tensor of the same stream.

A *residual* has the shape and dtype of the tensor it accompanies. It is added before encoding and replaced by what this
encoding lost, so over a sequence of tensors whose decoded values are added up, roundings do not add up: only the last
one is missing from the sum. Works with every codec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import extension

if TYPE_CHECKING:
    from . import Codec


def encode(codec: Codec, x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
    """Payload of ``x + residual``, both [n] of one dtype, written into ``out`` if given; ``residual`` becomes the loss.

    The sum and the difference are float32. A loss that is not finite (a block with NaN or Inf) is forgotten.
    """
    if out is None:
        out = x.new_empty(codec.wire_bytes(x.numel()), dtype=torch.uint8)
    if x.numel() and extension.encode_residual(codec, x, residual, out):
        return out
    carried = x.float() + residual.float()
    out = codec.encode(carried, out)
    lost = carried - codec.decode_sum([out], torch.empty_like(carried))
    residual.copy_(torch.where(lost.isfinite(), lost, 0.0))
    return out
