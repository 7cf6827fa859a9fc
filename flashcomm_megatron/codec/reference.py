"""What formats defined in torch share: encoding into a given payload, summing in float32, the fallback's one line.

A format that derives from :class:`Reference` says how long its sections are and how one tensor is encoded and decoded.
The compiled extension is asked first; where it does not know the format the definition itself serves.
"""

from __future__ import annotations

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import extension
from .planes import padded

logger = logging.getLogger("flashcomm_megatron")
_told: set[str] = set()


class Reference(ABC):
    """A codec (see :class:`~flashcomm_megatron.codec.Codec`) by its definition in torch."""

    @abstractmethod
    def section_bytes(self, numel: int) -> list[int]:
        """Unpadded length in bytes of every section of a payload of ``numel`` values."""

    @abstractmethod
    def encode_ref(self, x: Tensor) -> Tensor:
        """Payload of a contiguous, non-empty 1-D floating tensor."""

    @abstractmethod
    def decode_ref(self, payload: Tensor, numel: int) -> Tensor:
        """float32 values [numel] of one payload, ``numel`` > 0."""

    def wire_bytes(self, numel: int) -> int:
        """Length in bytes of the payload of ``numel`` values."""
        return sum(padded(size) for size in self.section_bytes(numel))

    def encode(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Encode a contiguous 1-D floating tensor into a uint8 payload of ``wire_bytes(x.numel())``."""
        if out is None:
            out = torch.empty(self.wire_bytes(x.numel()), dtype=torch.uint8, device=x.device)
        if x.numel() and not extension.encode(self, x, out):
            _tell(self)
            out.copy_(self.encode_ref(x))
        return out

    def decode_sum(self, payloads: Sequence[Tensor], out: Tensor) -> Tensor:
        """Write the float32 sum, in the order given, of the decoded payloads into ``out`` (1-D, any float dtype).

        With one payload this is plain decoding. Every part is limited to the finite range of ``out.dtype``;
        the sum may overflow to Inf as an exact sum would.
        """
        if out.numel() and not extension.decode_sum(self, payloads, out):
            _tell(self)
            out.copy_(self.decode_sum_ref(payloads, out.numel(), out.dtype))
        return out

    def decode_sum_ref(self, payloads: Sequence[Tensor], numel: int, dtype: torch.dtype) -> Tensor:
        """What :meth:`decode_sum` does, in torch."""
        if numel == 0:
            return torch.empty(0, dtype=dtype, device=payloads[0].device)
        return summed((self.decode_ref(payload, numel) for payload in payloads), dtype)


def summed(parts: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """float32 sum, in order, of parts each limited to the finite range of ``dtype``; one NaN for all NaNs."""
    limit, total = torch.finfo(dtype).max, None
    for part in parts:
        part = part.clamp(-limit, limit)
        total = part if total is None else total + part
    assert total is not None
    return torch.where(total.isnan(), math.nan, total).to(dtype)


def _tell(codec: object) -> None:
    """Log, on rank 0 and once for each format, that the PyTorch path serves."""
    name = type(codec).__name__
    if name not in _told and os.environ.get("RANK", "0") == "0":
        logger.warning(f"flash-comm: no compiled path for {name}; the PyTorch codec serves, slower.")
    _told.add(name)
