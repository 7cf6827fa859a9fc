"""What the codec costs in accuracy, sampled while the model runs.

Comparing a quantized collective with the exact one would send the exact bytes as well. What a rank can see for free is
the first rounding of its own contribution: x against decode(encode(x)). One in ``EVERY`` calls of a site is looked at,
in one window of at most ``WINDOW`` values that moves on through the tensor from sample to sample, so neither time nor
memory depends on the model. Sums stay on the device; :func:`read` is the only place that waits for it.

A *site* is where a collective stands: the kind of layer, else the collective's own name.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from ..codec import Codec

EVERY = 100  # calls of a site for one sample
WINDOW = 2**16  # values of one sample


class Error(NamedTuple):
    """What the samples of one site say."""

    relative: float  # root of (squared error / squared value), over blocks without NaN or Inf
    nan_blocks: int  # blocks that held NaN or Inf


_calls: Counter[str] = Counter()
_sums: dict[tuple[str, torch.device], Tensor] = {}  # float64 [squared error, squared value, blocks not finite]
_lock = threading.Lock()


def sample(name: str, x: Tensor, codec: Codec) -> None:
    """Note one call at site ``name`` that encodes ``x`` (any shape, contiguous); every hundredth is measured."""
    call, key = _calls[name], (name, x.device)
    _calls[name] = call + 1
    if call % EVERY or (x.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph would measure at each replay
        return
    flat, length = x.detach().reshape(-1), max(1, WINDOW // codec.block) * codec.block
    start = call // EVERY % math.ceil(flat.numel() / length) * length  # starting over at the end
    sums = measure(flat[start : start + length], codec)
    with _lock:
        _sums[key] = _sums[key].add_(sums) if key in _sums else sums


def read() -> dict[str, Error]:
    """Errors by site of what was sampled since the last read. Waits for the device, once for each site."""
    with _lock:
        sums = dict(_sums)
        _sums.clear()
    totals: dict[str, list[float]] = {}
    for (name, _), sum_ in sums.items():
        totals[name] = [a + b for a, b in zip(totals.get(name, [0.0] * 3), sum_.tolist(), strict=True)]
    return {
        name: Error(math.sqrt(error / value) if value else 0.0, round(blocks))
        for name, (error, value, blocks) in totals.items()
    }


def reset() -> None:
    """Forget every sample and count."""
    with _lock:
        _sums.clear()
        _calls.clear()


@torch.no_grad()
def measure(x: Tensor, codec: Codec) -> Tensor:
    """float64 [squared error, squared value, blocks not finite] of a flat ``x`` through ``codec``, on its device."""
    exact = x.float()
    found = codec.decode_sum([codec.encode(x)], torch.empty_like(exact))
    both = torch.stack([exact - found, exact]).double()
    if both.size(1) % codec.block:  # filled up with zeros
        both = torch.nn.functional.pad(both, (0, -both.size(1) % codec.block))
    sums = both.square_().view(2, -1, codec.block).sum(2)
    finite = sums[0].isfinite()  # a block that holds NaN or Inf decodes to NaN
    return torch.cat([torch.where(finite, sums, 0.0).sum(1), (~finite).sum().double().view(1)])
