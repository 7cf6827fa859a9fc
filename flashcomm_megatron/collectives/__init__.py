"""Quantized all_reduce, reduce_scatter and all_gather over (codec, group): what callers use.

The arithmetic is in algorithms.py; here it is planned, tied to a process group and counted.

Ranks end with identical bits: each rank's own part passes through the codec as well, sums run in rank order, and the
payload everybody decodes is the same bytes. Results are what ``sum(decode(encode(part)) for part in rank order)`` says.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..codec.recipes import Legs
from ..comm import links, topology, workspace
from ..config import Config
from ..observe import counters
from ..observe import error_sampling as sampling
from ..observe import messages as announce
from . import agreement, algorithms, hierarchical, hierarchical_halves
from . import compile as traced
from . import handle as calls
from . import plan as policy
from .algorithms import Residuals, Steps

ALL_REDUCE = {
    "one-step": (algorithms.one_step, algorithms.one_step_bytes),
    "two-step": (algorithms.two_step, algorithms.two_step_bytes),
    "hierarchical": (hierarchical.hierarchical, hierarchical.sent_bytes),
}
REDUCE_SCATTER = {
    "flat": (algorithms.reduce_scatter, algorithms.reduce_scatter_bytes),
    "hierarchical": (hierarchical_halves.reduce_scatter, hierarchical_halves.reduce_scatter_bytes),
}
ALL_GATHER = {
    "flat": (algorithms.all_gather, algorithms.all_gather_bytes),
    "hierarchical": (hierarchical_halves.all_gather, hierarchical_halves.all_gather_bytes),
}


# ---- public ---------------------------------------------------------------------------------------------------


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
    force. Integers, float64, empty and small tensors go through ``torch.distributed`` unchanged (policy.py).
    ``legs``: the codecs of a calibrated site, the same site on every rank.
    """
    if torch.compiler.is_compiling() and not async_op and legs is None and residuals is None:
        return traced.all_reduce(x, group, config)
    group, config = calls.resolve(group, config)
    x = x.contiguous()
    if not wants("all_reduce", x, group, config, legs):
        return calls.exact(x, dist.all_reduce(x, group=group, async_op=async_op), async_op)
    plan = _plan("all_reduce", x, group, config, legs)
    algorithm, sent = ALL_REDUCE[plan.algorithm]
    sampling.sample("all_reduce", x, plan.reduce)
    sent_bytes = sent(x.numel(), group.rank(), group.size(), plan)
    steps = _fused(plan.algorithm, x, x, group, plan, config, residuals)
    steps = steps or algorithm(x, calls.link("all_reduce", x.shape, x, group, config), plan, residuals)
    return calls.run(steps, plan.exact_bytes, sent_bytes, async_op)


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
        return traced.reduce_scatter(x, group, config)
    group, config = calls.resolve(group, config)
    world = group.size()
    if x.dim() == 0 or x.size(0) % world:
        raise ValueError(f"reduce_scatter: first dimension of {list(x.shape)} is not a multiple of {world} ranks.")
    x = x.contiguous()
    out = _output(out, x, x.size(0) // world)
    if not wants("reduce_scatter", x, group, config, legs):
        return calls.exact(out, dist.reduce_scatter_tensor(out, x, group=group, async_op=async_op), async_op)
    plan = _plan("reduce_scatter", x, group, config, legs)
    algorithm, sent = REDUCE_SCATTER[plan.algorithm]
    sampling.sample("reduce_scatter", x, plan.reduce)
    steps = _fused("reduce_scatter", x, out, group, plan, config, residuals)
    if steps is None:
        link = calls.link("reduce_scatter", x.shape, x, group, config)
        steps = algorithm(x, out, link, plan, residuals)
    return calls.run(steps, plan.exact_bytes, sent(out.numel(), group.rank(), world, plan), async_op)


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
        return traced.all_gather(x, group, config)
    group, config = calls.resolve(group, config)
    world = group.size()
    x = x.contiguous() if x.dim() else x.view(1)
    out = _output(out, x, world * x.size(0))
    if not wants("all_gather", x, group, config, legs):
        return calls.exact(out, dist.all_gather_into_tensor(out, x, group=group, async_op=async_op), async_op)
    plan = _plan("all_gather", x, group, config, legs)
    algorithm, sent = ALL_GATHER[plan.algorithm]
    sampling.sample("all_gather", x, plan.gather)
    steps = _fused("all_gather", x, out, group, plan, config)
    steps = steps or algorithm(x, out, calls.link("all_gather", x.shape, x, group, config), plan)
    return calls.run(steps, plan.exact_bytes, sent(x.numel(), group.rank(), world, plan), async_op)


def wants(collective: str, x: Tensor, group: dist.ProcessGroup, config: Config, legs: Legs | None = None) -> bool:
    """Whether ``collective`` over ``x`` is to be quantized; if not, the deferral is counted with its reason.

    The first use of a group compares the ranks' configurations, deferred or not (agreement.py).
    """
    workspace.raise_errors(group)
    agreement.check(group, config)
    plan = _plan(collective, x, group, config, legs)
    if plan.reason is None:
        return True
    announce.deferred(plan.reason, plan.exact_bytes, config)
    return False


def stats() -> dict[str, Any]:
    """Totals since the last reset: calls, quantized, deferred {reason: n}, {exact,wire,remote}_bytes, seconds.

    gpu_errors: which ranks a fused kernel waited for in vain, a sentence each; results since then are NaN.
    """
    return {**counters.stats(), "gpu_errors": workspace.errors()}


def prepare(group: dist.ProcessGroup | None = None, config: Config | None = None) -> None:
    """Exchange now the messages of a group's first collective, so that the next may be captured into a CUDA graph.

    On every rank. RuntimeError if the ranks hold different configurations, or during a capture.
    """
    group, config = calls.resolve(group, config)
    workspace.refuse_capture()
    agreement.check(group, config)
    topology.nodes(group)
    if torch.cuda.is_available() and workspace.CHAINS[config.transport]:
        workspace.prepare(group, config.transport)


traced.eager.update(all_reduce=all_reduce, reduce_scatter=reduce_scatter, all_gather=all_gather)


# ---- pieces ---------------------------------------------------------------------------------------------------


def _plan(collective: str, x: Tensor, group: dist.ProcessGroup, config: Config, legs: Legs | None) -> policy.Plan:
    return policy.plan(collective, x, group.size(), config, legs, links.wire(group, x.device, config))


def _fused(
    kind: str,
    x: Tensor,
    out: Tensor,
    group: dist.ProcessGroup,
    plan: policy.Plan,
    config: Config,
    residuals: Residuals | None = None,
) -> Steps | None:
    """The whole collective as one kernel, with the same results, where there is a transport and a kernel for it."""
    if kind not in workspace.KINDS:
        return None
    made = workspace.serving(group, x, plan, config.transport, residuals is not None)
    if made is None and x.is_cuda and config.transport in workspace.INBOXES:
        announce.unexpected(f"transport {config.transport} does not serve {kind}; the process group does.", config)
    if made is None:
        return None
    lost = [] if residuals is None else algorithms.fused_memories(kind, x, group.rank(), group.size(), plan, residuals)
    return _in_one_step(made, kind, x, out, plan, lost, links.seconds(group, config))


def _in_one_step(
    made: workspace.Workspace, kind: str, x: Tensor, out: Tensor, plan: policy.Plan, lost: list[Tensor], seconds: float
) -> Steps:
    return made.run(kind, (plan.reduce, plan.gather), x, out, lost, seconds=seconds)
    yield  # nothing to wait for: the stream does


def _output(out: Tensor | None, x: Tensor, rows: int) -> Tensor:
    shape = (rows, *x.shape[1:])
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous {x.dtype} of {list(shape)}, found {out.dtype} {list(out.shape)}.")
    return out
