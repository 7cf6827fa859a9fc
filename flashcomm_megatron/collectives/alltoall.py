"""Quantized all-to-all: the tokens that a mixture of experts sends to the ranks that hold them.

Every pair of ranks exchanges as many rows as the router says, so that no size is known to all ranks; both ends of a
message know its own, and it alone decides whether the message is coded or, being small, exact. What stays on a rank is
copied. Nobody else has to hold the same values, so there is nothing to agree on but the codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..codec.planes import padded
from ..codec.recipes import Legs
from ..comm.communicator import Call
from ..config import Config
from . import count_deferred, resolve
from .algorithms import Steps
from .handle import Handle, Launched, finish
from .plan import Plan, decide, message_codec


def all_to_all(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    config: Config | None = None,
    async_op: bool = False,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
    legs: Legs | None = None,
    by_row: bool = False,
) -> Any:
    """Send ``input_splits[r]`` rows of ``x`` [n, ...] to rank r; return ``output_splits[r]`` rows of each rank r.

    As ``torch.distributed.all_to_all_single``: rows arrive in rank order, and without splits every rank gets equally
    many. Messages are coded by the gather leg's codec. ValueError if the splits do not fit.
    """
    group, config = resolve(group, config)
    world, rank, x = group.size(), group.rank(), x.contiguous()
    outs, ins = _splits(output_splits, x, world), _splits(input_splits, x, world)
    if sum(ins) != x.size(0) or len(ins) != world or len(outs) != world:
        raise ValueError(f"all_to_all: splits {ins} and {outs} do not fit {x.size(0)} rows on {world} ranks.")
    if ins[rank] != outs[rank]:
        raise ValueError(f"all_to_all: this rank keeps {ins[rank]} of its own rows and awaits {outs[rank]} of them.")
    out = x.new_empty((sum(outs), *x.shape[1:]))
    plan = decide("all_to_all", x, group, config, legs=legs, by_row=by_row)
    plan = plan._replace(exact_bytes=(x.size(0) - ins[rank]) * x[:1].nbytes)
    if plan.deferred:
        count_deferred(plan)
        work = dist.all_to_all_single(out, x, outs, ins, group=group, async_op=async_op)
        return Launched(out, work) if async_op else out
    outgoing, incoming = (
        [part.view(-1) for part in torch.split(each, splits)] for each, splits in ((x, ins), (out, outs))
    )
    width, peers = _width(x), [peer != rank for peer in range(world)]
    sizes = tuple(
        [_size(part, plan, width) * away for part, away in zip(each, peers, strict=True)]
        for each in (outgoing, incoming)
    )
    plan = plan._replace(wire_bytes=sum(sizes[0]))
    steps = _steps(out, outgoing, incoming, sizes, plan, plan.call())
    return Handle(steps, out, plan).start() if async_op else finish(steps, out, plan)


def _size(part: Tensor, plan: Plan, width: int | None) -> int:
    """Bytes of a message; every one starts at a multiple of 16."""
    return padded(message_codec(part, plan).wire_bytes(part.numel(), width))


def _width(x: Tensor) -> int | None:
    """Values of a row, which stands alone in a message; None: a message is one row."""
    return x.size(-1) if x.dim() > 1 else None


def _steps(
    out: Tensor,
    outgoing: Sequence[Tensor],
    incoming: Sequence[Tensor],
    sizes: tuple[Sequence[int], ...],
    plan: Plan,
    call: Call,
) -> Steps:
    """Send ``outgoing[r]`` to rank r and fill ``incoming[r]``, a view of ``out``, from it; 1-D, of any length."""
    width = _width(out)
    outbox, inbox = (torch.empty(sum(each), dtype=torch.uint8, device=out.device) for each in sizes)
    for part, box in zip(outgoing, torch.split(outbox, list(sizes[0])), strict=True):
        if box.numel():
            codec = message_codec(part, plan)
            codec.encode(part, box[: codec.wire_bytes(part.numel(), width)], width=width)
    yield plan.transport.exchange(outbox, sizes[0], inbox, sizes[1], call)
    incoming[plan.comm.rank].copy_(outgoing[plan.comm.rank])
    for part, box in zip(incoming, torch.split(inbox, list(sizes[1])), strict=True):
        if box.numel():
            codec = message_codec(part, plan)
            codec.decode_sum([box[: codec.wire_bytes(part.numel(), width)]], part, width)
    return out


def _splits(given: Sequence[int] | None, x: Tensor, world: int) -> list[int]:
    if x.dim() == 0:
        raise ValueError("all_to_all: a tensor without dimensions has no rows to send.")
    if given is not None:
        return list(given)
    if x.size(0) % world:
        raise ValueError(f"all_to_all: first dimension of {list(x.shape)} is not a multiple of {world} ranks.")
    return [x.size(0) // world] * world
