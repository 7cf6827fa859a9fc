"""The values themselves: for the exact legs of an algorithm that quantizes only slow links (hierarchical.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Codec, summed


@dataclass(frozen=True)
class Raw(Codec):
    """Payloads are the bytes of tensors of ``dtype``."""

    dtype: torch.dtype
    block: int = 1

    def wire_bytes(self, numel: int, width: int | None = None) -> int:
        return numel * self.dtype.itemsize

    def section_bytes(self, numel: int, width: int | None = None) -> list[int]:
        """The one section: the values."""
        return [self.wire_bytes(numel)]

    def encode_ref(self, x: Tensor, width: int | None = None) -> Tensor:
        """The bytes of ``x``, which must be of ``dtype``."""
        return x.view(torch.uint8)

    def decode_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        return payload.view(self.dtype).float()

    def bounds_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        """Zeros: nothing is lost."""
        return torch.zeros(numel, device=payload.device)

    def encode(
        self, x: Tensor, out: Tensor | None = None, residual: Tensor | None = None, width: int | None = None
    ) -> Tensor:
        """The bytes of ``x``, which must be of ``dtype``; without ``out`` they are not copied."""
        payload = self.encode_ref(x)
        return payload if out is None else out.copy_(payload)

    def decode_sum(self, payloads: Sequence[Tensor], out: Tensor, width: int | None = None) -> Tensor:
        """Write the float32 sum, in order, into ``out`` (1-D, any float dtype); one payload is copied as it is."""
        parts = [payload.view(self.dtype) for payload in payloads]
        return out.copy_(parts[0] if len(parts) == 1 else summed((part.float() for part in parts), out.dtype))
