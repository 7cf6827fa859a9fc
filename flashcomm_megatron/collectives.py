"""Quantized all_reduce, reduce_scatter and all_gather over (codec, group).

- **two-step all_reduce** (Flash Communication, arXiv 2412.04964, algorithm 1): every rank sends each peer its slice,
  encoded; the owner decodes, sums in float32 in rank order and encodes the sum; everybody gathers and decodes.
- **one-step all_reduce** (Hansen-Palmus et al., arXiv 2411.09510): everybody gathers the encoded partial sums and adds
  them. One rounding instead of two, world / 2 times the bytes.
- **reduce_scatter** and **all_gather** are the two halves of two-step.

Ranks end with identical bits: each rank's own part passes through the codec as well, sums run in rank order, and the
payload everybody decodes is the same bytes. Results are what ``sum(decode(encode(part)) for part in rank order)`` says.

Each algorithm is a generator that yields the transfers it has to wait for. Run to its end it is a blocking collective;
started and left at its first transfer it is an asynchronous one, whose handle finishes the arithmetic in ``wait()``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import agreement, policy, sampling, stats
from .codec import Codec
from .config import Config, current
from .recipes import Legs
from .transport.group import exchange

Steps = Generator[list[dist.Work], None, Tensor]


class Handle:
    """A started collective. ``wait()`` finishes it and returns its result; waiting twice is allowed."""

    def __init__(self, steps: Steps, exact_bytes: int, wire_bytes: int) -> None:
        self._steps = steps
        self._bytes = exact_bytes, wire_bytes
        self._seconds = 0.0
        self._transfers: list[dist.Work] = []
        self._result: Tensor | None = None
        self._advance()

    def wait(self) -> Tensor:
        """Block (on a GPU: make the current stream wait) until the result is there, and return it."""
        while self._result is None:
            self._advance()
        return self._result

    @torch.no_grad()
    def _advance(self) -> None:
        started = time.perf_counter()
        for transfer in self._transfers:
            transfer.wait()
        try:
            self._transfers = next(self._steps)
        except StopIteration as end:
            self._result = end.value
        self._seconds += time.perf_counter() - started
        if self._result is not None:
            stats.count_quantized(*self._bytes, self._seconds)


class Exact:
    """Handle of a collective that was left to torch.distributed."""

    def __init__(self, result: Tensor, work: dist.Work | None) -> None:
        self._result, self._work = result, work

    def wait(self) -> Tensor:
        """Block until the result is there, and return it."""
        if self._work is not None:
            self._work.wait()
        return self._result


# ---- public ---------------------------------------------------------------------------------------------------


def all_reduce(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    config: Config | None = None,
    async_op: bool = False,
    legs: Legs | None = None,
) -> Any:
    """Sum ``x`` (any shape) over the ranks of ``group``; into ``x`` itself when it is contiguous.

    Use the returned tensor (with ``async_op``: the returned handle's ``wait()``). ``config`` defaults to the one in
    force. Integers, float64, empty and small tensors go through ``torch.distributed`` unchanged (policy.py).
    ``legs``: the codecs of a calibrated site, the same site on every rank.
    """
    group, config = _resolve(group, config)
    x = x.contiguous()
    if not wants("all_reduce", x, group, config, legs):
        return _exact(x, dist.all_reduce(x, group=group, async_op=async_op), async_op)
    plan = policy.plan("all_reduce", x, group.size(), config, legs)
    algorithm, sent = {"one-step": (_one_step, _one_step_bytes), "two-step": (_two_step, _two_step_bytes)}[
        plan.algorithm
    ]
    sampling.sample("all_reduce", x, plan.reduce)
    return _run(algorithm(x, group, plan), plan, sent(x.numel(), group, plan), async_op)


def reduce_scatter(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    config: Config | None = None,
    async_op: bool = False,
    out: Tensor | None = None,
    legs: Legs | None = None,
) -> Any:
    """Sum ``x`` [N * s, ...] over N ranks and return this rank's slice [s, ...]. ValueError if N does not divide."""
    group, config = _resolve(group, config)
    world = group.size()
    if x.dim() == 0 or x.size(0) % world:
        raise ValueError(f"reduce_scatter: first dimension of {list(x.shape)} is not a multiple of {world} ranks.")
    x = x.contiguous()
    out = _output(out, x, x.size(0) // world)
    if not wants("reduce_scatter", x, group, config, legs):
        return _exact(out, dist.reduce_scatter_tensor(out, x, group=group, async_op=async_op), async_op)
    plan = policy.plan("reduce_scatter", x, world, config, legs)
    sent = (world - 1) * plan.reduce.wire_bytes(out.numel())
    sampling.sample("reduce_scatter", x, plan.reduce)
    return _run(_reduce_scatter(x, out, group, plan), plan, sent, async_op)


def all_gather(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    config: Config | None = None,
    async_op: bool = False,
    out: Tensor | None = None,
) -> Any:
    """Concatenate ``x`` [s, ...] of N ranks in rank order to [N * s, ...]; this rank's part is encoded like any other."""
    group, config = _resolve(group, config)
    world = group.size()
    x = x.contiguous()
    out = _output(out, x, world * x.size(0) if x.dim() else world)
    if not wants("all_gather", x, group, config):
        return _exact(out, dist.all_gather_into_tensor(out, x, group=group, async_op=async_op), async_op)
    plan = policy.plan("all_gather", x, world, config)
    sent = (world - 1) * plan.gather.wire_bytes(x.numel())
    sampling.sample("all_gather", x, plan.gather)
    return _run(_all_gather(x, out, group, plan), plan, sent, async_op)


def wants(collective: str, x: Tensor, group: dist.ProcessGroup, config: Config, legs: Legs | None = None) -> bool:
    """Whether ``collective`` over ``x`` is to be quantized; if not, the deferral is counted with its reason.

    The first use of a group compares the ranks' configurations, deferred or not (agreement.py).
    """
    agreement.check(group, config, x.device)
    plan = policy.plan(collective, x, group.size(), config, legs)
    if plan.reason is None:
        return True
    stats.count_deferred(plan.reason, plan.exact_bytes)
    return False


# ---- algorithms -----------------------------------------------------------------------------------------------


def _one_step(x: Tensor, group: dist.ProcessGroup, plan: policy.Plan) -> Steps:
    codec, flat, rank = plan.reduce, x.view(-1), group.rank()
    inbox = _inbox(codec, flat, group)
    codec.encode(flat, inbox[rank])
    yield exchange([inbox[rank]] * len(inbox), inbox, group)
    codec.decode_sum(inbox, flat)
    return x


def _two_step(x: Tensor, group: dist.ProcessGroup, plan: policy.Plan) -> Steps:
    slices = _slices(x.view(-1), group.size(), plan)
    mine = slices[group.rank()]
    yield from _reduce_leg(slices, mine, group, plan.reduce)
    yield from _gather_leg(mine, slices, group, plan.gather)
    return x


def _reduce_scatter(x: Tensor, out: Tensor, group: dist.ProcessGroup, plan: policy.Plan) -> Steps:
    slices = list(x.view(-1).chunk(group.size()))
    yield from _reduce_leg(slices, out.view(-1), group, plan.reduce)
    return out


def _all_gather(x: Tensor, out: Tensor, group: dist.ProcessGroup, plan: policy.Plan) -> Steps:
    slices = list(out.view(-1).chunk(group.size()))
    yield from _gather_leg(x.view(-1), slices, group, plan.gather)
    return out


def _reduce_leg(slices: list[Tensor], mine: Tensor, group: dist.ProcessGroup, codec: Codec) -> Steps:
    """Send every rank its slice; write the sum of what all ranks sent here into ``mine``."""
    rank = group.rank()
    outbox = [codec.encode(part) for part in slices]
    inbox = _inbox(codec, mine, group)
    inbox[rank] = outbox[rank]
    yield exchange(outbox, inbox, group)
    return codec.decode_sum(inbox, mine)


def _gather_leg(mine: Tensor, slices: list[Tensor], group: dist.ProcessGroup, codec: Codec) -> Steps:
    """Send ``mine`` to every rank; decode what rank r sent, also this one, into ``slices[r]``."""
    payload = codec.encode(mine)
    inbox = [payload.new_empty(codec.wire_bytes(part.numel())) for part in slices]
    inbox[group.rank()] = payload
    yield exchange([payload] * len(inbox), inbox, group)
    for part, received in zip(slices, inbox, strict=True):
        codec.decode_sum([received], part)
    return mine


# ---- pieces ---------------------------------------------------------------------------------------------------


def _slices(flat: Tensor, world: int, plan: policy.Plan) -> list[Tensor]:
    """Cut [n] into ``world`` slices at multiples of both legs' blocks; the last ones may be short or empty."""
    length = _slice_length(flat.numel(), world, plan)
    return [flat[rank * length : (rank + 1) * length] for rank in range(world)]


def _slice_length(numel: int, world: int, plan: policy.Plan) -> int:
    unit = math.lcm(plan.reduce.block, plan.gather.block)
    return math.ceil(math.ceil(numel / world) / unit) * unit


def _inbox(codec: Codec, values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """One empty payload per rank, each for as many values as ``values`` has."""
    size = codec.wire_bytes(values.numel())
    return [torch.empty(size, dtype=torch.uint8, device=values.device) for _ in range(group.size())]


def _one_step_bytes(numel: int, group: dist.ProcessGroup, plan: policy.Plan) -> int:
    return (group.size() - 1) * plan.reduce.wire_bytes(numel)


def _two_step_bytes(numel: int, group: dist.ProcessGroup, plan: policy.Plan) -> int:
    """Every other rank is sent its slice, then this rank's slice."""
    world, rank = group.size(), group.rank()
    length = _slice_length(numel, world, plan)
    sizes = [min(max(numel - peer * length, 0), length) for peer in range(world)]
    reduce = sum(plan.reduce.wire_bytes(size) for peer, size in enumerate(sizes) if peer != rank)
    return reduce + (world - 1) * plan.gather.wire_bytes(sizes[rank])


def _output(out: Tensor | None, x: Tensor, rows: int) -> Tensor:
    shape = (rows, *x.shape[1:])
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous {x.dtype} of {list(shape)}, found {out.dtype} {list(out.shape)}.")
    return out


def _run(steps: Steps, plan: policy.Plan, wire_bytes: int, async_op: bool) -> Any:
    handle = Handle(steps, plan.exact_bytes, wire_bytes)
    return handle if async_op else handle.wait()


def _exact(result: Tensor, work: dist.Work | None, async_op: bool) -> Any:
    return Exact(result, work) if async_op else result


def _resolve(group: dist.ProcessGroup | None, config: Config | None) -> tuple[dist.ProcessGroup, Config]:
    config = config or current()
    if config is None:
        raise ValueError("flash-comm is off: pass config=Config(bits=4) or call enable(bits=4) first.")
    return group or dist.group.WORLD, config
