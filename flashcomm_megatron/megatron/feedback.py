"""Residual feedback: what a rounding lost is added to the rank's next contribution to the same residual stream.

A transformer adds the output of every row-parallel layer to one residual stream, so an error made by one collective
stays in the stream unless a later one takes it out again. With feedback each rank keeps, between the layers of one
forward pass, what its roundings lost: of its partial sum on the reduce leg, of its finished slice on the gather leg.
It adds that to what it encodes next on the same leg. The stream then carries one rounding error at a time instead of
the sum of all, at no byte on the wire.

Measured, not assumed
---------------------
That is right only where sums reach the stream unchanged. A norm behind the sum, a multiplier, a gate, a mixture of
streams: each makes it wrong, without bound. So every transformer layer is measured by the first forward that could use
feedback in it, before it is used there:

    output of the layer - its input  =  sum of what its row-parallel layers returned, within the dtype's rounding

(:mod:`measure` says how that is decided.) The ranks vote, because under sequence parallelism each sees its own tokens.
A layer that fails has no feedback from then on; its class is said once and counted.

From one layer to the next the residuals travel with the tensor that the layer returned. A layer that is handed that
very tensor goes on with them; a layer that is handed any other starts anew. So two batches that one model runs in
turns, depths of multi-token prediction, and streams that are mixed between layers never share residuals, and when the
tensor is freed, behind the last layer, so are they.

Feedback is off, and counted with its reason: in training (dropout scales the output, recomputation runs a layer twice),
where gradients are recorded or will be when a layer is run again, outside of a transformer layer, inside a mixture of
experts, in the forward that measures, and while a CUDA graph is captured, whose replays would not see the residuals of
the layers around it.
``--flash-comm-feedback off`` turns it off everywhere.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..codec.recipes import RECIPES
from ..collectives.algorithms import Residuals
from ..collectives.plan import Plan
from ..comm import votes
from ..config import current
from ..observe import counters, messages
from . import last_sum, measure, modes
from .patching import Function, untraced

ON = "on"
MEASURING = "this forward measures"


class _Stream:
    """A residual stream on its way through the layers: what was lost, and what kind of contribution lost it."""

    def __init__(self) -> None:
        self.residuals = Residuals()
        self.kind: Any = None  # shape, dtype, device, group and configuration
        self.blocks: dict[str, int] = {}  # by leg; those of a last sum may be others
        self.sample: Tensor | None = None  # of the tensor it travels with, while layers are measured


class _Visit:
    """One transformer layer whose forward is running."""

    def __init__(self, layer: nn.Module, x: Tensor, outer: _Visit | None) -> None:
        found: _Stream | None = _streams.pop(x, None) if len(_streams) else None
        self.layer, self.x, self.outer, self.stream = layer, x, outer, found or _Stream()
        # In a checkpoint, an autograd function, gradients are off the first time and on when it is run again.
        self.is_run_again = not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()
        self.is_in_mixture = False
        self.rows: list[Tensor] | None = None  # while measuring: samples of what was contributed
        self.missed = False  # whether something was contributed before measuring began

    def measure(self, group: Any) -> None:
        """Measure from here on: the first sum of the layer that is compressed is about to be."""
        self.rows, self.group, self.start = [], group, measure.sample(self.x)

    def adds_up(self, output: Tensor) -> bool:
        """What was measured: of this layer, and of what may have happened to its input before."""
        before = self.stream.sample
        follows = before is None or torch.equal(before, self.start)
        return follows and measure.adds_up(self.start, measure.sample(output), self.rows or [])


class _Here(threading.local):
    visit: _Visit | None = None


_here = _Here()
_streams: Any = WeakTensorKeyDictionary()
_adds_up: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # layer: what was measured


def residuals(layer: nn.Module, x: Tensor, group: Any, plan: Plan) -> Residuals | None:
    """The residuals for the collective that sums ``layer``'s partial sum ``x``, or None where feedback is off."""
    config = plan.config
    if not RECIPES[config.recipe].feedback or config.feedback == "off":
        return None
    reason = _reason(layer, x, group)
    counters.count_feedback(reason or ON)
    if reason or _here.visit is None:
        return None
    stream, kind = _here.visit.stream, (x.shape, x.dtype, x.device, group, config)
    if stream.kind != kind:
        stream.residuals, stream.kind = Residuals(), kind
    blocks = {"reduce": plan.reduce.fitted(x.size(-1)).block, "gather": plan.gather.fitted(x.size(-1)).block}
    blocks["across"] = blocks["reduce"]  # between sockets
    if blocks != stream.blocks:  # a leg whose blocks are as before goes on
        kept = stream.residuals.kept
        stream.residuals.kept = {key: kept[key] for key in kept if stream.blocks[key[1]] == blocks[key[1]]}
        stream.blocks = blocks
    return stream.residuals


def forget() -> None:
    """Free all residuals, and measure every layer anew."""
    _streams.clear()
    _adds_up.clear()


def held() -> int:
    """How many residual streams are kept between layers at this moment."""
    return len(_streams)


def _reason(layer: nn.Module, x: Tensor, group: Any) -> str | None:
    """Why there is no feedback here, or None. Asked at every call: a few attributes."""
    visit = _here.visit
    if layer.training:
        return "training"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if modes.is_batch_invariant(layer):
        return modes.BATCH_INVARIANT
    if visit is None:
        return "outside of a transformer layer"
    if visit.is_run_again:
        return "gradients are recorded"
    if visit.is_in_mixture:
        return "inside a mixture of experts"
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    if visit.layer in _adds_up:
        return None if _adds_up[visit.layer] else f"{type(visit.layer).__name__} does not add its sums unchanged"
    if visit.rows is None and not visit.missed:
        visit.measure(group)
    return MEASURING


# ---- what takes the place of Megatron's forwards -------------------------------------------------------------------


def layer_forward(original: Function) -> Function:
    """A transformer layer: its residual stream goes in, and comes out with what its sums lost."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        visit = _enter(self, args[0] if args else kwargs.get("hidden_states"))
        if visit is None:
            return original(self, *args, **kwargs)
        output = None
        try:
            output = original(self, *args, **kwargs)
        finally:
            _leave(visit, output[0] if isinstance(output, tuple) else output)
        return output

    return forward


def mixture_forward(original: Function) -> Function:
    """A mixture of experts: one contribution, whatever runs inside."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        visit = _here.visit
        if visit is None or visit.is_in_mixture:
            return original(self, *args, **kwargs)
        visit.is_in_mixture = True
        try:
            output = original(self, *args, **kwargs)
        finally:
            visit.is_in_mixture = False
        contributed(output)
        return output

    return forward


@untraced
def contributed(output: Any) -> None:
    """Note what a row-parallel layer or a mixture returned, if the layer around it is being measured.

    ``output``: a tensor, or a tensor and a bias (or None) that the caller adds.
    """
    visit = _here.visit
    if visit is None or visit.is_in_mixture:
        return
    if visit.rows is None:
        visit.missed = True
        return
    value, bias = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    if isinstance(value, Tensor):
        visit.rows.append(measure.sample(value if bias is None else value + bias))


@untraced
def _enter(layer: nn.Module, x: Any) -> _Visit | None:
    """Begin of a layer; None where there is no feedback in it."""
    last_sum.entered(layer)
    config = current()
    if config is None or config.feedback == "off" or not RECIPES[config.recipe].feedback:
        return None
    if layer.training or torch.is_grad_enabled() or not isinstance(x, Tensor):
        return None
    _here.visit = _Visit(layer, x, _here.visit)
    return _here.visit


@untraced
def _leave(visit: _Visit, output: Any) -> None:
    """End of a layer: decide on what was measured, and let the residuals travel with the output, if there is one."""
    _here.visit = visit.outer
    if not isinstance(output, Tensor):
        return
    if visit.rows is not None:
        agreed = not votes.failure("" if visit.adds_up(output) else "does not add up", visit.group)
        _adds_up[visit.layer] = agreed
        if not agreed:
            messages.say(
                f"flash-comm: residual feedback is off in {type(visit.layer).__name__}: what it returns is not its "
                "input plus what its row-parallel layers returned."
            )
    if _adds_up.get(visit.layer) and (visit.rows is not None or visit.stream.kind is not None):
        visit.stream.sample = None if visit.rows is None else measure.sample(output)
        _streams[output] = visit.stream
