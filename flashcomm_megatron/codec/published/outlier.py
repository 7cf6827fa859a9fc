"""Calibrated 4-bit integers with the widest features kept exact: Dong et al., arXiv 2411.07942.

The idea
--------
The outliers of an activation sit in the same few features at every token. So a calibration run can find them once. The
widest 1/64 of the features are then sent as they are, in bfloat16, and all others as 4-bit integers with a scale for
each feature that never changes. Every rank knows all scales, so payloads carry no metadata at all. The calibration run
(calibrate.py) notes the smallest and largest value of each feature e on each rank i; then, at every site, for good::

    range[e] = sum over ranks i of 2 * max(|min_i[e]|, |max_i[e]|)      the E / 64 widest features stay bfloat16
    scale_i[e] = max(|min_i[e]|, |max_i[e]|) / 7                        the others: q = round(x / scale), -7..7

Features and scales are static and known to every rank, so no metadata travels: the receiver decodes rank i's payload
with rank i's scales. That makes this the one format that knows its sender and its place in the model.

A token of 8 features. The fourth reaches furthest and is kept; the others reached 1.4 in the calibration, so their
scale is 0.2, and 1.5 becomes 1.4::

    >>> reach = torch.tensor([[1.4, 1.4, 1.4, 9.0, 1.4, 1.4, 1.4, 1.4]])
    >>> codec = from_ranges(-reach, reach, rank=0)
    >>> x = torch.tensor([0.3, -1.2, 0.7, 8.5, -0.4, 0.0, 1.5, -0.9])
    >>> [round(value, 2) for value in codec.decode_ref(codec.encode_ref(x), 8).tolist()]
    [0.4, -1.2, 0.8, 8.5, -0.4, 0.0, 1.4, -0.8]

The wire
--------
Sections for ``rows`` tokens of E features, k of them kept, aligned as in planes.py::

    | 4-bit plane, features not kept, ascending | kept features, ascending |
    | rows * (E - k) / 2 bytes                  | rows * k x bf16          |

4 + 12 / 64 = 4.1875 bits per value where 64 divides E, and at least one feature is kept where E < 64.

The paper's range is -8..7; here -8 is reserved: a NaN or an Inf travels as -8 and decodes to NaN (in a kept feature, as
a bfloat16 NaN). Only values beyond the calibrated range lose by it.

Error: ``scale / 2`` inside the calibrated range, ``|x| - 7 * scale`` beyond it, which no bound limits: the calibration
text has to resemble the traffic. Kept features are off by their rounding to bfloat16. A constant is exact only if it is
a multiple of its feature's scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..base import ROUNDING, Codec, summed
from ..planes import (
    BFLOAT16_MAX,
    NAN_BITS,
    from_half_words,
    from_high_half,
    half_words,
    high_half,
    join_planes,
    join_sections,
    plane_bytes,
    split_planes,
    split_sections,
)

BITS = 4
LARGEST = 7  # codes run from -7 to 7
NAN_CODE = -8
FEATURES_PER_KEPT = 64
SMALLEST_SCALE = 2.0**-120  # below, the reciprocal leaves float32: such a feature is zero


@dataclass(frozen=True, eq=False)
class Outlier(Codec):
    """Codec of one site on one rank. Compared by identity; the ranks of a group differ in ``rank`` alone.

    ``kept``: int64 [k], ascending. ``scales``: float32 [ranks, features].
    """

    rank: int
    kept: Tensor
    scales: Tensor

    @property
    def block(self) -> int:  # type: ignore[override]
        """Features of one token; tensors are cut between tokens."""
        return self.scales.size(1)

    def section_bytes(self, numel: int, width: int | None = None) -> list[int]:
        """Unpadded length in bytes of both sections; ValueError unless the values are whole tokens."""
        if numel % self.block:
            raise ValueError(f"outlier: expected tokens of {self.block} features, found {numel} values.")
        kept = numel // self.block * self.kept.numel()
        return [*plane_bytes(numel - kept, BITS), 2 * kept]

    def encode_ref(self, x: Tensor, width: int | None = None) -> Tensor:
        """Payload of a contiguous, non-empty 1-D floating tensor, with this rank's scales."""
        tables, rows = _tables(self, x.device), x.view(-1, self.block).float()
        finite, values = rows.isfinite(), rows.nan_to_num(0.0, 0.0, 0.0)
        codes = (values * tables.inverses[self.rank]).round().clamp(-LARGEST, LARGEST)
        codes = torch.where(finite, codes, NAN_CODE).to(torch.int8).index_select(1, tables.rest)
        exact = values.bfloat16().float().clamp(-BFLOAT16_MAX, BFLOAT16_MAX)
        words = torch.where(finite, high_half(exact), NAN_BITS).index_select(1, tables.kept)
        plane = split_planes((codes & 0xF).view(torch.uint8).flatten(), BITS)
        return join_sections([*plane, half_words(words.flatten())])

    def decode_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        """float32 values [numel] of a payload that this rank encoded, ``numel`` > 0."""
        return self._decode_from(self.rank, payload, numel)

    def decode_sum_ref(
        self, payloads: Sequence[Tensor], numel: int, dtype: torch.dtype, width: int | None = None
    ) -> Tensor:
        """Sum of one payload of each rank, in rank order; a single payload is this rank's own."""
        ranks = [self.rank] if len(payloads) == 1 else range(self.scales.size(0))
        if len(payloads) != len(ranks):
            raise ValueError(f"outlier: expected one payload for each of {len(ranks)} ranks, found {len(payloads)}.")
        if numel == 0:
            return torch.empty(0, dtype=dtype, device=payloads[0].device)
        parts = (self._decode_from(rank, payload, numel) for rank, payload in zip(ranks, payloads, strict=True))
        return summed(parts, dtype, self.bound_of_sum(payloads, numel, dtype, width))

    def bounds_ref(self, payload: Tensor, numel: int, width: int | None = None) -> Tensor:
        """float32 [numel] of a payload that this rank encoded, as far as the calibrated range reaches."""
        return self.bounds_of(self.rank, payload, numel, width)

    def bounds_of(self, rank: int, payload: Tensor, numel: int, width: int | None) -> Tensor:
        """Half a scale; of kept features what rounding to bfloat16 may take."""
        kept = _tables(self, payload.device).kept
        bounds = (self.scales.to(payload.device)[rank] * ROUNDING).repeat(numel // self.block, 1)
        bounds[:, kept] = self._decode_from(rank, payload, numel).view_as(bounds)[:, kept].abs() * 2.0**-8
        return bounds.flatten()

    def _decode_from(self, rank: int, payload: Tensor, numel: int) -> Tensor:
        """float32 values [numel] of a payload that ``rank`` encoded."""
        tables, rows = _tables(self, payload.device), numel // self.block
        plane, words = split_sections(payload, self.section_bytes(numel))
        codes = (join_planes([plane], BITS)[: rows * tables.rest.numel()].int() ^ 8) - 8
        scaled = codes.view(rows, -1).float() * self.scales.to(payload.device)[rank].index_select(0, tables.rest)
        values = torch.empty(rows, self.block, device=payload.device)
        values[:, tables.rest] = torch.where(codes.view(rows, -1) == NAN_CODE, math.nan, scaled)
        values[:, tables.kept] = from_high_half(from_half_words(words)).view(rows, -1)
        return values.flatten()


@dataclass(frozen=True)
class Uncalibrated(Codec):
    """Stands where there is no site: it has no scales, so whatever would be sent through it must stay exact."""

    block = 8

    def section_bytes(self, *args: Any, **kwargs: Any) -> NoReturn:
        """ValueError, as the methods below."""
        raise ValueError("recipe outlier encodes at calibrated sites only, the row-parallel layers of a running model.")

    encode_ref = decode_ref = bounds_ref = section_bytes


def from_ranges(low: Tensor, high: Tensor, rank: int) -> Outlier:
    """The codec of ``rank`` from every rank's calibrated minima and maxima, float32 [ranks, features]."""
    reach = torch.maximum(low.abs(), high.abs())
    features = reach.size(1)
    widest = (2 * reach).sum(0).sort(descending=True, stable=True).indices
    kept = widest[: max(1, features // FEATURES_PER_KEPT)].sort().values
    scales = reach / LARGEST
    return Outlier(rank, kept, torch.where(scales < SMALLEST_SCALE, 0.0, scales))


class _Tables(NamedTuple):
    """Constants of a codec on one device."""

    kept: Tensor
    rest: Tensor
    inverses: Tensor


@cache
def _tables(codec: Outlier, device: torch.device) -> _Tables:
    is_kept = torch.zeros(codec.block, dtype=torch.bool).index_fill(0, codec.kept, True)
    inverses = torch.where(codec.scales > 0, 1 / codec.scales, 0.0)
    return _Tables(codec.kept.to(device), (~is_kept).nonzero()[:, 0].to(device), inverses.to(device))
