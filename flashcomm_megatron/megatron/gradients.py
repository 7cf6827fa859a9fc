"""Gradients: what Megatron-Core's linear layers communicate in backward, with a width of its own.

    column site   TP                     all-reduce of the input's gradient, overlapped with the weight gradient
                  frozen weight (LoRA)   the same, not overlapped
                  sequence parallelism   reduce-scatter of the input's gradient, overlapped
    row site      sequence parallelism   all-gather of the output's gradient

The idea
--------
Backward runs on autograd's threads, after every forward has returned, so a column layer's autograd functions carry
their site from forward to backward. There it serves two ends. The input that is gathered a second time for the weight
gradient is compressed as the first time, and has the same bits. And gradients are compressed as ``grad_bits`` says;
16 leaves them to the original collectives.

The all-reduce is written inline in both functions' backward, as a call of ``torch.distributed.all_reduce`` with the
group that the function keeps. torch hands that call on to the group's own ``allreduce``, so for the time of the
original backward the function is given a group that compresses there (:class:`Compressing`). Nothing global is
replaced, and the call stays where it was: it starts before the weight gradient is computed and is waited for after.

A gradient that holds a NaN or an Inf decodes to NaN on every rank, so loss scalers skip the step as before. No memory
of roundings is kept in training (feedback.py).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from .. import collectives
from ..collectives.plan import Plan, exact_bytes
from ..observe import counters, messages
from . import context, modes
from .context import Site
from .patching import Function

EXACT = "gradients exact"  # the reason that counts what grad_bits 16 leaves alone
NOT_A_SUM = "no sum of one contiguous gradient"
EXACTLY = {"all_gather": "_gather_along_first_dim", "reduce_scatter": "_reduce_scatter_along_first_dim"}


class Compressing:
    """A process group whose ``allreduce`` compresses gradients; everything else is the group's own."""

    def __init__(self, group: Any, site: Site) -> None:
        self._group, self._site = group, site

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def allreduce(self, tensors: list[Tensor], *options: Any) -> Any:
        """Sum the one contiguous tensor over the ranks, in place; returns what is waited for. All else is the group's.

        ``options``: none, torch.distributed's AllreduceOptions, or what is done instead of a sum and a timeout.
        """
        x, *others = tensors
        op = getattr(options[0], "reduceOp", options[0]) if options else dist.ReduceOp.SUM
        if others or op != dist.ReduceOp.SUM or not x.is_contiguous():
            nbytes = sum(exact_bytes("all_reduce", each.nbytes, self._group.size()) for each in tensors)
            messages.deferred(NOT_A_SUM, nbytes, self._site.config)
            return self._group.allreduce(tensors, *options)
        plan = planned("all_reduce", x, self._group, self._site)
        if plan is None:
            return self._group.allreduce(tensors, *options)
        return collectives.run(plan, x, async_op=True, site=self._site)


def run(collective: str, gradient: Tensor, group: Any, site: Site) -> Any:
    """The result of "all_gather" or "reduce_scatter" along the first dimension, compressed or by Megatron's own."""
    plan = planned(collective, gradient, group, site)
    if plan is not None:
        return collectives.run(plan, gradient, site=site)
    from megatron.core.tensor_parallel import mappings

    return getattr(mappings, EXACTLY[collective])(gradient.contiguous(), group)


def planned(collective: str, gradient: Tensor, group: Any, site: Site) -> Plan | None:
    """The plan for a gradient, whose samples are filed by themselves; None: deferred and counted, or observed."""
    if context.observer() is not None or modes.forbids(site, collective, gradient, group):
        return None
    legs = site.config.gradient_legs
    if legs is None:
        counters.count_deferred(EXACT, exact_bytes(collective, gradient.nbytes, group.size()))
        return None
    at = site._replace(kind=f"{site.kind}-gradient")
    plan = collectives.decide(collective, gradient, group, site.config, at, legs, modes.is_batch_invariant(site.module))
    if plan.deferred:
        collectives.count_deferred(plan)
        return None
    return plan


# ---- what takes the place of Megatron's functions ------------------------------------------------------------------


def linear_backward(original: Function) -> Function:
    """Backward of a linear layer's autograd function: at its site, with a group that compresses its gradient."""

    def backward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        site, group = getattr(ctx, "flash_comm_site", None), ctx.tp_group
        if site is not None and ctx.allreduce_dgrad:
            ctx.tp_group = Compressing(group, site)
        try:
            with context.at(site):
                return original(ctx, *args, **kwargs)
        finally:
            ctx.tp_group = group

    return backward


def reduce_scatter_tensor(original: Function) -> Function:
    """Gradient of a column-parallel layer's input under sequence parallelism."""

    def reduce_scatter_tensor(
        output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        site = context.site()
        at_column = site is not None and site.kind == "column" and group is not None and op == dist.ReduceOp.SUM
        plan = planned("reduce_scatter", input, group, site) if site is not None and at_column else None
        if plan is None:
            return original(output, input, op=op, group=group, async_op=async_op)
        handle = collectives.run(plan, input, output, async_op, site=site)
        return handle if async_op else None

    return reduce_scatter_tensor
