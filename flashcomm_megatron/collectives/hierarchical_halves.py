"""Reduce-scatter and all-gather over several machines: what crosses between machines crosses once, quantized.

Flat, every rank sends to every rank of the other machines. Here each machine appoints, for every rank elsewhere, one of
its own ranks as *carrier*. **reduce_scatter**: the carrier adds up, exactly, what its machine has for that rank, and
sends the quantized sum; the owner adds the sums of all machines in their order, its own machine's quantized as well.
**all_gather**: a rank sends its payload to its own machine and to its carrier on every other one, who passes it on
unchanged, so that the result has the bits of the flat all-gather.

With L ranks on each machine that is 1 / L of the flat bytes between machines.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..codec import Raw
from ..comm.link import Link, Transfer
from . import algorithms, pieces
from .algorithms import Going, Residuals, Steps
from .hierarchical import among, members_of
from .plan import Plan


class Machines(NamedTuple):
    """Which ranks are on which machine."""

    members: list[list[int]]  # of each machine, in order
    nodes: tuple[int, ...]  # the machine of each rank, counted from 0: transport/topology.py

    def carrier(self, node: int, rank: int) -> int:
        """Who on machine ``node`` deals with ``rank``: on its own machine the rank itself."""
        mates = self.members[node]
        return mates[self.members[self.nodes[rank]].index(rank) % len(mates)]

    def carried(self, rank: int) -> list[int]:
        """The ranks, of all machines, that ``rank`` deals with, itself among them."""
        return [each for each in range(len(self.nodes)) if self.carrier(self.nodes[rank], each) == rank]


def machines(plan: Plan) -> Machines:
    """The machines of the ranks of ``plan``."""
    return Machines(members_of(plan.nodes), plan.nodes)


def reduce_scatter(x: Tensor, out: Tensor, link: Link, plan: Plan, residuals: Residuals | None = None) -> Steps:
    """Sum of every rank's ``x``, this rank's slice of it in ``out``."""
    slices, mine = x.view(-1).chunk(link.world), out.view(-1)
    yield from pieces.together(
        _reduce_scatter(
            [each[first:last] for each in slices], mine[first:last], link, plan, algorithms.part(residuals, number)
        )
        for number, (first, last) in enumerate(pieces.cuts(mine.numel(), plan.piece))
    )
    return out


def _reduce_scatter(slices: list[Tensor], mine: Tensor, link: Link, plan: Plan, residuals: Residuals | None) -> Going:
    here, me = machines(plan), link.rank
    mates, carried = here.members[here.nodes[me]], here.carried(me)
    parts = [torch.cat([slices[rank] for rank in here.carried(mate)]) for mate in mates]
    total = torch.empty(len(carried) * mine.numel(), dtype=torch.float32, device=mine.device)
    yield from algorithms.reduce_leg(parts, [None] * len(mates), total, among(link, mates), Raw(plan.dtype))

    sums = total.chunk(len(carried))
    lost = algorithms.memories(residuals, "reduce", plan.reduce, sums)
    outbox, inbox = _empty(link, mine), _empty(link, mine)
    for rank, each, memory in zip(carried, sums, lost, strict=True):
        outbox[rank] = algorithms.encode(plan.reduce, each, memory)
    carriers = [here.carrier(node, me) for node in range(len(here.members))]
    for carrier in carriers:
        inbox[carrier] = torch.empty_like(outbox[me]) if carrier != me else outbox[me]
    yield link.exchange(outbox, inbox)
    plan.reduce.decode_sum([inbox[carrier] for carrier in carriers], mine)


def all_gather(x: Tensor, out: Tensor, link: Link, plan: Plan) -> Steps:
    """Every rank's ``x`` in rank order, in ``out``."""
    return algorithms.gather_in_pieces(_all_gather, x, out, link, plan)


def _all_gather(mine: Tensor, slices: list[Tensor], link: Link, plan: Plan) -> Going:
    here, me = machines(plan), link.rank
    mates = here.members[here.nodes[me]]
    payload = plan.gather.encode(mine)
    payloads = [torch.empty_like(payload) for _ in range(link.world)]
    payloads[me] = payload

    outbox, inbox = _empty(link, mine), _empty(link, mine)
    for rank in {*mates, *(here.carrier(node, me) for node in range(len(here.members)))}:
        outbox[rank] = payload
    for rank in {*mates, *here.carried(me)}:
        inbox[rank] = payloads[rank]
    yield link.exchange(outbox, inbox)

    spread: list[Transfer] = []
    for rank in range(link.world):  # each from its carrier to the carrier's machine, if it is of another
        carrier = here.carrier(here.nodes[me], rank)
        if here.nodes[rank] != here.nodes[me]:
            outbox, inbox = _empty(link, mine), _empty(link, mine)
            if carrier == me:
                for mate in mates:
                    outbox[mate] = payloads[rank]
            else:
                inbox[carrier] = payloads[rank]
            spread += link.exchange(outbox, inbox)
    yield spread
    for part, received in zip(slices, payloads, strict=True):
        plan.gather.decode_sum([received], part)


def _empty(link: Link, like: Tensor) -> list[Tensor]:
    """No message to or from any rank."""
    return [torch.empty(0, dtype=torch.uint8, device=like.device)] * link.world


# ---- bytes ------------------------------------------------------------------------------------------------------


def reduce_scatter_bytes(numel: int, rank: int, world: int, plan: Plan) -> int:
    """Bytes that ``rank`` sends, to its own machine and to others; ``numel``: values of a slice."""
    here = machines(plan)
    mates = here.members[here.nodes[rank]]
    inside = sum(len(here.carried(mate)) for mate in mates if mate != rank) * numel * plan.dtype.itemsize
    return inside + (len(here.carried(rank)) - 1) * algorithms.wire_bytes(plan.reduce, numel, plan.piece)


def all_gather_bytes(numel: int, rank: int, world: int, plan: Plan) -> int:
    """Bytes that ``rank`` sends, to its own machine and to others; ``numel``: values of a slice."""
    here = machines(plan)
    mates = len(here.members[here.nodes[rank]])
    messages = mates - 1 + len(here.members) - 1 + (len(here.carried(rank)) - 1) * (mates - 1)
    return messages * algorithms.wire_bytes(plan.gather, numel, plan.piece)
