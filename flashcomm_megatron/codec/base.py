"""What every number format offers the collectives, and the fallback of those without a compiled form.

A codec turns a contiguous tensor of rows [numel / width, width] into a uint8 *payload* whose length depends on the
shape alone. A row is one token. Rows stand alone: no block, and nothing else that is shared, holds values of two rows,
so a row decodes to the same bits whatever stands beside it. Every method takes ``width``. None, or a width beyond the
number of values, means one row: all values, or a part of a longer row.

A format derives from :class:`Codec` and says three things: how long its sections are, how one tensor is encoded, how
one payload is decoded, all in torch: that is its definition. What the collectives call is made of these here, in
batches, all slices of a tensor at once, so that a collective costs two or three native calls for any number of ranks:

    encode_slices   the payloads of all slices of a tensor         reduce leg, first half
    reduce_slices   the sum of one payload of each rank, encoded   reduce leg, second half, and the gather leg's first
    decode_slices   all payloads back into their places            gather leg, second half

The compiled extension is asked first; where it does not know the format or the device, the definition serves, with the
same bits.
"""

from __future__ import annotations

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from . import native as compiled
from .native import Received
from .planes import padded

logger = logging.getLogger("flashcomm_megatron")
_warned: set[str] = set()

OVERFLOW = 65520.0  # what rounds to Inf in float16
MOST_OFF = OVERFLOW / 2  # of an error bound that counts: sums below half of OVERFLOW are never Inf
ROUNDING = 33 / 64  # half a step, and what choosing the code in float32 costs at most


class Slices(NamedTuple):
    """A tensor of ``numel`` values cut into ``world`` slices of ``length``; the last ones may be short or empty."""

    numel: int
    width: int  # values of a row; slices end at row ends, or, in a tensor of one row, where a codec's unit does
    length: int
    world: int

    def size(self, number: int) -> int:
        """Values of slice ``number``."""
        return min(max(self.numel - number * self.length, 0), self.length)

    def of(self, x: Tensor) -> list[Tensor]:
        """The slices of a flat tensor, views."""
        return [x[number * self.length : number * self.length + self.size(number)] for number in range(self.world)]

    @property
    def sizes(self) -> list[int]:
        """Values of every slice."""
        return [self.size(number) for number in range(self.world)]


class Codec(ABC):
    """A number format. Codecs are immutable and hashable."""

    keeps_residuals: ClassVar[bool] = False  # whether encode() can add what the last encoding lost (rotated.py)
    super_block: ClassVar[int] = 1  # blocks that share the top of their scales (rotated.py)
    block: int  # values that share a scale

    @cached_property
    def layouts(self) -> dict[tuple[int, ...], compiled.Layout]:
        """Slices that the compiled extension was asked about, and how it knows them (native.py)."""
        return {}

    @property
    def native(self) -> tuple[int, int, int] | None:
        """(format, bits, block) as the compiled extension knows this codec (csrc/api.h); None: it does not."""
        return None

    @property
    def unit(self) -> int:
        """A tensor of one row (a 1-D gradient) is cut into slices at multiples of this many values."""
        return self.super_block * self.block

    def fitted(self, width: int) -> Codec:
        """The codec that serves rows of ``width`` values: this one, or the same format with smaller blocks."""
        return self

    def without_kernel(self, dtype: torch.dtype, numel: int, width: int) -> str:
        """What of a tensor in rows of ``width`` values csrc/cuda has no kernel for, in words; empty if it has one.

        Of a codec that the extension knows. It looks at no extension, so that all ranks know the same.
        """
        return f"rows of {width} values in blocks of {self.block}" if numel > width and width % self.block else ""

    # ---- the definition --------------------------------------------------------------------------------------

    @abstractmethod
    def section_bytes(self, numel: int, width: int | None = None) -> list[int]:
        """Unpadded length in bytes of every section of a payload of ``numel`` values in rows of ``width``."""

    @abstractmethod
    def encode_ref(self, x: Tensor, width: int | None = None) -> Tensor:
        """Payload of a contiguous, non-empty 1-D floating tensor."""

    @abstractmethod
    def decode_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        """float32 values [numel] of one payload, ``numel`` > 0."""

    def encode_residual_ref(self, x: Tensor, residual: Tensor, width: int | None = None) -> Tensor:
        """What :meth:`encode` does with a residual, in torch."""
        raise ValueError(f"residuals: {self} keeps none of what it loses; only codecs of recipe auto do.")

    def decode_sum_ref(
        self, payloads: Sequence[Tensor], numel: int, dtype: torch.dtype, width: int | None = None
    ) -> Tensor:
        """What :meth:`decode_sum` does, in torch."""
        if numel == 0:
            return torch.empty(0, dtype=dtype, device=payloads[0].device)
        parts = (self.decode_ref(payload, numel, width) for payload in payloads)
        return summed(parts, dtype, self.bound_of_sum(payloads, numel, dtype, width))

    def bounds_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        """float32 [numel]: by how much each decoded value may be off, at most; what a NaN has does not matter."""
        raise ValueError(f"float16: {self} has no error bound, without which sums of float16 may hide an overflow.")

    def bound_of_sum(
        self, payloads: Sequence[Tensor], numel: int, dtype: torch.dtype, width: int | None
    ) -> Tensor | None:
        """By how much each value of a sum in float16 may be off; None where nothing depends on it."""
        if dtype != torch.float16 or len(payloads) == 1:
            return None
        total = self.bounds_of(0, payloads[0], numel, width)
        for rank, payload in enumerate(payloads[1:], start=1):
            total = total + self.bounds_of(rank, payload, numel, width)
        return total

    def bounds_of(self, rank: int, payload: Tensor, numel: int, width: int | None) -> Tensor:
        """:meth:`bounds_ref` of a payload that ``rank`` encoded; where ranks encode alike, it does not matter which."""
        return self.bounds_ref(payload, numel, width)

    # ---- one tensor ------------------------------------------------------------------------------------------

    def wire_bytes(self, numel: int, width: int | None = None) -> int:
        """Length in bytes of the payload of ``numel`` values in rows of ``width``."""
        return _wire_bytes(self, numel, width)

    def residual_numel(self, numel: int, width: int | None = None) -> int:
        """Numbers of the residual of ``numel`` values in rows of ``width``. ValueError for codecs that keep none."""
        raise ValueError(f"residuals: {self} keeps none of what it loses; only codecs of recipe auto do.")

    def encode(
        self, x: Tensor, out: Tensor | None = None, residual: Tensor | None = None, width: int | None = None
    ) -> Tensor:
        """Encode a contiguous 1-D floating tensor into a uint8 payload of ``wire_bytes(x.numel(), width)``.

        ``residual`` [residual_numel(x.numel(), width)], of the dtype of ``x`` and zeros at first: encode
        ``x + residual``; the residual is replaced by the new rounding error.
        """
        _refuse_shapes("encode: x", x)
        numel, size = x.numel(), self.wire_bytes(x.numel(), width)
        if out is None:
            out = torch.empty(size, dtype=torch.uint8, device=x.device)
        if out.numel() != size:
            raise ValueError(f"encode: out has {out.numel()} bytes; the codec's payload has {size}.")
        if numel and not compiled.encode_slices(self, x, Slices(numel, width or numel, numel, 1), out, residual):
            _warn_fallback(self)
            out.copy_(self.encode_ref(x, width) if residual is None else self.encode_residual_ref(x, residual, width))
        return out

    def decode_sum(self, payloads: Sequence[Tensor], out: Tensor, width: int | None = None) -> Tensor:
        """Write the float32 sum, in the order given, of the decoded payloads into ``out`` (1-D, any float dtype).

        With one payload this is plain decoding. Every part is limited to the finite range of ``out.dtype``; the sum
        overflows to Inf as an exact sum would, in float16 wherever the exact sum may have (:func:`rounded`).
        """
        _refuse_shapes("decode_sum: out", out)
        numel = out.numel()
        if numel and not compiled.reduce_slices(self, payloads, out, width or numel, None, None, None):
            _warn_fallback(self)
            out.copy_(self.decode_sum_ref(payloads, numel, out.dtype, width))
        return out

    # ---- all slices of a tensor --------------------------------------------------------------------------------

    def wire_bytes_of(self, slices: tuple[int, ...]) -> int:
        """Bytes of all payloads: each but the last takes ``wire_bytes(slices.length, slices.width)``."""
        return _wire_bytes_of(self, Slices(*slices))

    def residual_numel_of(self, slices: Slices) -> int:
        """Numbers of the residuals of all slices."""
        return _residual_numel_of(self, slices)

    def encode_slices(self, x: Tensor, slices: Slices, out: Tensor, residuals: Tensor | None = None) -> None:
        """Encode every slice of ``x``: payload r lies at ``r * wire_bytes(slices.length, slices.width)``.

        ``out``: uint8, at least ``wire_bytes_of(slices)``. ``residuals``: those of all slices, one behind the other.
        """
        if slices.numel == 0 or compiled.encode_slices(self, x, slices, out, residuals):
            return
        stride, first = self.wire_bytes(slices.length, slices.width), 0
        for number, part in enumerate(slices.of(x.view(-1))):
            payload = out[number * stride :][: self.wire_bytes(part.numel(), slices.width)]
            end = first if residuals is None else first + self.residual_numel(part.numel(), slices.width)
            self.encode(part, payload, None if residuals is None else residuals[first:end], slices.width)
            first = end

    def reduce_slices(
        self,
        payloads: Sequence[Tensor] | Received,
        out: Tensor,
        gather: Codec | None = None,
        payload: Tensor | None = None,
        residual: Tensor | None = None,
        width: int | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        """Write the float32 sum, in the order given, of one payload of each rank into ``out``.

        With ``gather`` the sum, as ``out`` holds it, is encoded by that codec into ``payload``, with its ``residual``.
        ``part``: only into these values of ``out``, from the first to before the second.
        """
        first, end = part or (0, out.numel())
        numel = end - first
        if numel == 0 or compiled.reduce_slices(self, payloads, out, width or numel, gather, payload, residual, part):
            return
        mine = out.view(-1)[first:end]
        self.decode_sum(payloads.payloads() if isinstance(payloads, Received) else payloads, mine, width)
        if gather is not None and payload is not None:
            gather.encode(mine, payload[: gather.wire_bytes(numel, width)], residual, width)

    def decode_slices(self, payloads: Tensor, slices: Slices, out: Tensor) -> None:
        """Decode payload r, at ``r * wire_bytes(slices.length, slices.width)``, into slice r of ``out``."""
        if slices.numel == 0 or compiled.decode_slices(self, payloads, slices, out):
            return
        stride = self.wire_bytes(slices.length, slices.width)
        for number, part in enumerate(slices.of(out.view(-1))):
            payload = payloads[number * stride :][: self.wire_bytes(part.numel(), slices.width)]
            self.decode_sum([payload], part, slices.width)


def _refuse_shapes(name: str, x: Tensor) -> None:
    """ValueError for a tensor of several dimensions, whose rows nobody has named."""
    if x.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, strides {x.stride()}; expected contiguous 1-D.")


@lru_cache(4096)
def _wire_bytes(codec: Codec, numel: int, width: int | None) -> int:
    return sum(padded(size) for size in codec.section_bytes(numel, width))


@lru_cache(4096)
def _wire_bytes_of(codec: Codec, slices: Slices) -> int:
    stride = codec.wire_bytes(slices.length, slices.width)
    last = [number for number, size in enumerate(slices.sizes) if size]
    return last[-1] * stride + codec.wire_bytes(slices.size(last[-1]), slices.width) if last else 0


@lru_cache(4096)
def _residual_numel_of(codec: Codec, slices: Slices) -> int:
    return sum(codec.residual_numel(size, slices.width) for size in slices.sizes)


def summed(parts: Iterable[Tensor], dtype: torch.dtype, bound: Tensor | None = None) -> Tensor:
    """Sum in float32, in order, of parts each limited to the finite range of ``dtype``, as :func:`rounded` to it."""
    limit, total = torch.finfo(dtype).max, None
    for part in parts:
        part = part.clamp(-limit, limit)
        total = part if total is None else total + part
    assert total is not None
    return rounded(total, dtype, bound)


def rounded(total: Tensor, dtype: torch.dtype, bound: Tensor | None) -> Tensor:
    """``total`` as ``dtype``, one NaN for all NaNs. A sum of float16 is Inf where the exact sum may be too large.

    A loss scaler waits for that Inf: what an exact sum shows as Inf or NaN must not come out finite because a value was
    rounded down. ``bound``: by how much the sum may be off, at worst; no more of it counts than ``MOST_OFF``, so that
    sums which are far from overflowing stay finite.
    """
    if bound is not None:
        infinite = torch.copysign(torch.full_like(total, math.inf), total)
        total = torch.where(total.abs() + bound.clamp(max=MOST_OFF) >= OVERFLOW, infinite, total)
    return torch.where(total.isnan(), math.nan, total).to(dtype)


def _warn_fallback(codec: object) -> None:
    """Log, on rank 0 and once for each format, that the PyTorch path serves."""
    name = type(codec).__name__
    if name not in _warned and os.environ.get("RANK", "0") == "0":
        logger.warning(f"flash-comm: no compiled path for {name}; the PyTorch codec serves, slower.")
    _warned.add(name)
