"""The compressed collectives as autograd functions, and the one question every seam asks: compress here?

:func:`planned` answers with a plan inside a site of the right kind, None everywhere else and where the call is
deferred. Gradients travel as gradients.py says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import collectives
from ..collectives.algorithms import Residuals
from ..collectives.plan import Plan
from ..observe import counters
from . import calibrated, context, feedback, gradients, last_sum, modes


class Planned(NamedTuple):
    """A collective at a site that is to be compressed."""

    plan: Plan
    residuals: Residuals | None = None  # what this rank's roundings lost at the layers before


def planned(kind: str, collective: str, x: Tensor, group: Any, reason: str | None = None) -> Planned | None:
    """How to compress, or None: not inside a site of this kind, deferred and counted, or only observed.

    ``reason``: why the caller must have the original, if it must.
    """
    site = context.site()
    if site is None or site.kind != kind or group is None:
        return None
    observer = context.observer()
    if observer is not None:
        if kind == "row":
            observer(site.module, x, group)
        return None
    if modes.forbids(site, collective, x, group, reason):
        return None
    row = kind == "row"
    legs = calibrated.legs(site.config, site.module, group) if row else None
    last = last_sum.bits(site.config, site.module) if row else None
    if last is not None:
        legs = site.config.legs_of(last)
    plan = collectives.decide(collective, x, group, site.config, site, legs, modes.is_batch_invariant(site.module))
    if plan.deferred:
        collectives.count_deferred(plan)
        return None
    if last is not None:
        counters.count_last_sum(last)
    # asked here: inside an autograd function gradients look switched off
    return Planned(plan, feedback.residuals(site.module, x, group, plan) if row else None)


def as_original_wants(kind: str, x: Tensor) -> Tensor:
    """``x`` as the original collective is handed it at a site: contiguous.

    Megatron's own sum leaves a tensor that is not contiguous unsummed. Compressed sums do not, so a call that is
    deferred must not either, or a layer would be right at one length and wrong at another.
    """
    site = context.site()
    return x.contiguous() if site is not None and site.kind == kind else x


def run(x: Tensor, group: Any, call: Planned) -> Any:
    """The result of a planned collective, recorded for backward."""
    return _Collective.apply(x, group, call)  # type: ignore[no-untyped-call]


def send(call: Planned, x: Tensor, site: Any, out: Tensor | None = None, async_op: bool = False) -> Any:
    """The result of a planned collective, or its handle."""
    return collectives.run(call.plan, x, out, async_op, call.residuals, site)


class _Collective(torch.autograd.Function):
    """Along the first dimension a scattered sum has a gathered gradient, and the other way round. The gradient of a sum
    that every rank holds is the gradient itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, call: Planned) -> Any:
        ctx.kind, ctx.group, ctx.site = call.plan.kind, group, context.site()
        return send(call, x, ctx.site)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.kind == "all_reduce":
            return grads[0], None, None
        back = "all_gather" if ctx.kind == "reduce_scatter" else "reduce_scatter"
        return gradients.run(back, grads[0], ctx.group, ctx.site), None, None
