"""Residual feedback: what a rounding lost is given back by the rank's next contribution to the same residual stream.

A transformer adds the output of every row-parallel layer to one residual stream, so an error made by one collective
stays in the stream unless a later one takes it out again. With feedback each rank remembers, between the layers of one
forward pass, what its roundings lost, of its partial sum on the reduce leg and of its finished slice on the gather leg,
and adds it to what it encodes next on that leg (the memory of codec/rotated.py). The stream then carries one rounding
error at a time instead of the sum of all, at no byte on the wire.

That is right only where outputs really are added up unchanged. Feedback is off, and counted with its reason:

- in training: dropout scales the output, recomputation runs a layer twice, gradients would not match the forward;
- where the residual branch is normalized (``apply_residual_connection_post_layernorm``);
- for shared experts, whose output a router may scale;
- while a CUDA graph is captured, whose replays would not see the memory of the layers around it.

A memory begins at the first row-parallel layer of a stack of layers and is forgotten when that layer, or an earlier one
than the last, comes round again (the next forward pass, the next micro-batch, the next generated token) and whenever
shape, dtype, device, group or configuration change.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..codec.recipes import RECIPES
from ..collectives.algorithms import Residuals
from ..config import Config
from . import sites

ON = "on"


class _Stream:
    """The memory of one stack of layers on this thread's forward pass."""

    def __init__(self) -> None:
        self.residuals = Residuals()
        self.last = -1  # place of the layer that contributed last
        self.kind: Any = None  # shape, dtype, device, group and configuration of its contribution


class _Place(NamedTuple):
    """Where a layer stands: its stack's memory, its number in execution order, whether it feeds the stream directly."""

    stream: _Stream
    number: int
    is_direct: bool


_places: WeakKeyDictionary[nn.Module, _Place] = WeakKeyDictionary()
_counts: Counter[str] = Counter()
_lock = threading.Lock()


def residuals(layer: nn.Module, x: Tensor, group: Any, config: Config) -> Residuals | None:
    """The memory to hand to the collective that sums ``layer``'s partial sum ``x``, or None where feedback is off."""
    if not RECIPES[config.recipe].feedback:
        return None
    reason = _reason(layer, x)
    _counts[reason or ON] += 1
    return None if reason else _recall(_place(layer), (x.shape, x.dtype, x.device, group, config))


def counts() -> dict[str, int]:
    """How many contributions were given feedback ("on") and how many were not, by reason."""
    return dict(_counts)


def reset_counts() -> None:
    """Forget the counts."""
    _counts.clear()


def _reason(layer: Any, x: Tensor) -> str | None:
    """Why there is no feedback here, or None. Asked at every call: one attribute or flag each."""
    if layer.training:
        return "training"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if getattr(layer.config, "apply_residual_connection_post_layernorm", False):
        return "the residual branch is normalized"
    if not _place(layer).is_direct:
        return "shared experts"
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    return None


def _recall(place: _Place, kind: Any) -> Residuals:
    """The stack's memory as it is before the layer at ``place`` contributes a tensor of ``kind``."""
    stream = place.stream
    if place.number <= stream.last or stream.kind != kind:
        stream.residuals = Residuals()
    stream.last, stream.kind = place.number, kind
    return stream.residuals


def _place(layer: nn.Module) -> _Place:
    """Where ``layer`` stands; the first time, all layers of its model are noted, which must be running."""
    if layer not in _places:
        with _lock:
            _note(sites.row_layers(layer))
    return _places[layer]


def _note(rows: dict[str, nn.Module]) -> None:
    """Give every row-parallel layer of a model, by name, its place. A stack is what stands before ``.layers.``."""
    streams: dict[str, _Stream] = {}
    for number, (name, row) in enumerate(rows.items()):
        stack = f".{name}".partition(".layers.")[0]
        _places[row] = _Place(streams.setdefault(stack, _Stream()), number, "shared_experts" not in name.split("."))
