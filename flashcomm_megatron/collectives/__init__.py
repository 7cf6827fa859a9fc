"""Quantized all_reduce, reduce_scatter and all_gather over process groups: what callers use.

One call is one decision (plan.py) and one run of an algorithm (algorithms.py):

    plan = decide(kind, x, group, config, site)     communicator, codecs, algorithm, sizes: found by one lookup
    if plan.deferred: ...                           left to torch.distributed, counted with the reason
    run(plan, x, ...)                               one fused kernel, or ALGORITHMS[plan.algorithm]

Ranks end with identical bits: each rank's own part passes through the codec as well, sums run in rank order, and the
payload everybody decodes is the same bytes. Results are what ``sum(decode(encode(part)) for part in rank order)`` says.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..codec.recipes import Legs
from ..comm import fused
from ..comm.communicator import Communicator
from ..config import Config, current
from ..observe import counters, error_sampling, messages
from . import agreement, algorithms, compile
from .algorithms import Residuals
from .handle import Handle, Launched, finish, profiled
from .hierarchical import hierarchical, over_sockets
from .plan import Plan, Site, decide

__all__ = ["agree", "all_gather", "all_reduce", "count_deferred", "decide", "prepare", "reduce_scatter", "run", "stats"]

ALGORITHMS = {
    "one-step": algorithms.one_step,
    "two-step": algorithms.two_step,
    "hierarchical": hierarchical,
    "sockets": over_sockets,
    "reduce_scatter": algorithms.reduce_scatter,
    "all_gather": algorithms.all_gather,
}


# ---- public -----------------------------------------------------------------------------------------------------


def all_reduce(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    config: Config | None = None,
    async_op: bool = False,
    legs: Legs | None = None,
    residuals: Residuals | None = None,
) -> Any:
    """Sum ``x`` (any shape) over the ranks of ``group``; into ``x`` itself when it is contiguous.

    Use the returned tensor (with ``async_op``: the returned handle's ``wait()``). ``config`` defaults to the one in
    force. Integers, float64, empty and small tensors go through ``torch.distributed`` unchanged (plan.py).
    ``legs``: the codecs of a calibrated site, the same site on every rank.
    """
    if torch.compiler.is_compiling() and not async_op and legs is None and residuals is None:
        return compile.all_reduce(x, group, config)
    group, config = resolve(group, config)
    x = x.contiguous()
    plan = decide("all_reduce", x, group, config, legs=legs)
    if plan.deferred:
        count_deferred(plan)
        return _exact(x, dist.all_reduce(x, group=group, async_op=async_op), async_op)
    return run(plan, x, None, async_op, residuals)


def reduce_scatter(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    config: Config | None = None,
    async_op: bool = False,
    out: Tensor | None = None,
    legs: Legs | None = None,
    residuals: Residuals | None = None,
) -> Any:
    """Sum ``x`` [N * s, ...] over N ranks and return this rank's slice [s, ...]. ValueError if N does not divide."""
    if torch.compiler.is_compiling() and not async_op and out is None and legs is None and residuals is None:
        return compile.reduce_scatter(x, group, config)
    group, config = resolve(group, config)
    x = x.contiguous()
    plan = decide("reduce_scatter", x, group, config, legs=legs)
    out = output("reduce_scatter", x, group.size(), out)
    if plan.deferred:
        count_deferred(plan)
        return _exact(out, dist.reduce_scatter_tensor(out, x, group=group, async_op=async_op), async_op)
    return run(plan, x, out, async_op, residuals)


def all_gather(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    config: Config | None = None,
    async_op: bool = False,
    out: Tensor | None = None,
    legs: Legs | None = None,
) -> Any:
    """Concatenate ``x`` [s, ...] of N ranks in rank order to [N * s, ...]; this rank's part is encoded as well.

    A tensor without dimensions counts as [1].
    """
    if torch.compiler.is_compiling() and not async_op and out is None and legs is None:
        return compile.all_gather(x, group, config)
    group, config = resolve(group, config)
    x = x.contiguous() if x.dim() else x.view(1)
    out = output("all_gather", x, group.size(), out)
    plan = decide("all_gather", x, group, config, legs=legs)
    if plan.deferred:
        count_deferred(plan)
        return _exact(out, dist.all_gather_into_tensor(out, x, group=group, async_op=async_op), async_op)
    return run(plan, x, out, async_op)


def stats() -> dict[str, Any]:
    """Totals since the last reset: calls, quantized, deferred {reason: n}, {exact,wire,remote}_bytes, seconds.

    gpu_errors: which ranks a fused kernel waited for in vain, a sentence each; results since then are NaN.
    """
    return {**counters.stats(), "gpu_errors": fused.errors()}


def prepare(group: dist.ProcessGroup | None = None, config: Config | None = None) -> None:
    """Exchange now the messages of a group's first collective, so that the next may be captured into a CUDA graph.

    On every rank. RuntimeError if the ranks hold different configurations, or during a capture.
    """
    group, config = resolve(group, config)
    fused.refuse_capture()
    comm = Communicator.of(group)
    agree(group, config)
    _ = comm.nodes
    if torch.cuda.is_available():
        _ = comm.gpus
        if fused.CHAINS.get(config.transport):
            fused.prepare(group, config.transport)


# ---- what they are made of, for callers that ask first and call later --------------------------------------------


def run(
    plan: Plan,
    x: Tensor,
    out: Tensor | None = None,
    async_op: bool = False,
    residuals: Residuals | None = None,
    site: Site | None = None,
) -> Any:
    """The result of a planned collective over ``x``, or its handle; in ``out`` if given, of an all_reduce in ``x``."""
    x = x.contiguous()
    if out is None:
        out = x if plan.kind == "all_reduce" else output(plan.kind, x, plan.comm.world)
    error_sampling.sample(plan.label, x, plan.gather if plan.kind == "all_gather" else plan.reduce)
    if x.is_cuda and _launch_fused(plan, x, out, residuals):
        return Launched(out, None) if async_op else out
    steps = ALGORITHMS[plan.algorithm](x, out, plan, plan.call(), residuals)
    return Handle(steps, out, plan, site).start(x) if async_op else finish(steps, out, plan, site)


def agree(group: dist.ProcessGroup, config: Config) -> None:
    """RuntimeError on every rank unless all hold ``config``; :func:`decide` asks as well."""
    agreement.check(Communicator.of(group), config)


def count_deferred(plan: Plan) -> None:
    """Count a call that is left to the original collective; RuntimeError where ``strict`` forbids it."""
    messages.deferred(plan.deferred or "", plan.exact_bytes, plan.config)


def resolve(group: dist.ProcessGroup | None, config: Config | None) -> tuple[dist.ProcessGroup, Config]:
    """The group and the configuration that a call without them means. ValueError if flash-comm is off."""
    config = config or current()
    if config is None:
        raise ValueError("flash-comm is off: pass config=Config(bits=4) or call enable(bits=4) first.")
    if not isinstance(config, Config):
        raise ValueError(f"config={config!r}: expected a Config, as in config=Config(bits=4).")
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("flash-comm has no process group: call torch.distributed.init_process_group() first.")
    if isinstance(group, int):  # torch's GroupMember.NON_GROUP_MEMBER
        raise ValueError("flash-comm: this rank is no member of the group. Call it on the group's ranks alone.")
    return group, config


def output(kind: str, x: Tensor, world: int, out: Tensor | None = None) -> Tensor:
    """Where a reduce_scatter or an all_gather of ``x`` writes: ``out`` if given. ValueError for what does not fit."""
    shape = (x.size(0) // world if kind == "reduce_scatter" else x.size(0) * world, *x.shape[1:])
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous {x.dtype} of {list(shape)}, found {out.dtype} {list(out.shape)}.")
    return out


def _exact(result: Tensor, work: dist.Work | None, async_op: bool) -> Any:
    """The result, or the handle, of a collective that was left to torch.distributed."""
    return Launched(result, work) if async_op else result


def _launch_fused(plan: Plan, x: Tensor, out: Tensor, residuals: Residuals | None) -> bool:
    """Whether one kernel does the collective, with the same results: where there is a transport and a kernel for it."""
    if plan.algorithm not in fused.KINDS or not isinstance(plan.comm, Communicator):
        return False
    transport = plan.config.transport
    made = fused.serving(plan.comm.group, x, plan, transport, residuals is not None)
    if made is None and transport in fused.INBOXES:
        messages.unexpected(f"transport {transport} does not serve {plan.kind}; the process group does.", plan.config)
    if made is None:
        return False
    started = time.perf_counter()
    kept = algorithms.fused_residuals(x, plan, residuals)
    with profiled(plan):
        fused.launch(made, plan, x, out, kept)
    counters.count_quantized(plan, time.perf_counter() - started)
    return True
