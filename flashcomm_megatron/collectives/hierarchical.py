"""All-reduce over several machines: exact inside each, quantized between them, where the wire is slow.

Every machine sums its ranks' tensors, each of its ranks a slice of them; the ranks that hold the same slice on
different machines all-reduce it quantized; then each machine spreads the results. A machine may hold any number of
ranks: the tensor has as many slices as the largest holds ranks, and where there are fewer, a rank holds several.

The sum is ``sum(decode(encode(exact sum of a machine)) for machines in order)``: fewer roundings than one per rank,
and the same bits everywhere, because every machine adds the same payloads in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..codec import Raw
from ..comm.link import Link, Transfer
from . import algorithms, pieces
from .algorithms import Going, Residuals, Steps
from .plan import Plan


class Layout(NamedTuple):
    """Who holds what of ``numel`` values. ``members``: the ranks of every machine, in order."""

    members: list[list[int]]
    length: int  # of a slice
    numel: int

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return max(map(len, self.members))

    def node(self, rank: int) -> int:
        """The machine of ``rank``."""
        return next(node for node, ranks in enumerate(self.members) if rank in ranks)

    def owner(self, node: int, number: int) -> int:
        """The rank that holds slice ``number`` on machine ``node``."""
        ranks = self.members[node]
        return ranks[number * len(ranks) // self.slices]

    def held(self, node: int, rank: int) -> list[int]:
        """The slices that ``rank`` of machine ``node`` holds: neighbours."""
        return [number for number in range(self.slices) if self.owner(node, number) == rank]

    def span(self, first: int, last: int) -> slice:
        """The values of the slices ``first`` to ``last``."""
        return slice(min(first * self.length, self.numel), min((last + 1) * self.length, self.numel))

    def spans(self, node: int) -> list[slice]:
        """The values that each rank of machine ``node`` holds."""
        held = [self.held(node, rank) for rank in self.members[node]]
        return [self.span(numbers[0], numbers[-1]) for numbers in held]


@lru_cache
def members_of(nodes: tuple[int, ...]) -> list[list[int]]:
    """The ranks of every machine, in order. ``nodes``: the machine of every rank."""
    return [[rank for rank, node in enumerate(nodes) if node == each] for each in sorted(set(nodes))]


def layout(numel: int, plan: Plan) -> Layout:
    """The layout of ``numel`` values over ``plan.nodes``."""
    members = members_of(plan.nodes)
    unit = math.lcm(plan.reduce.block, plan.gather.block)
    length = math.ceil(math.ceil(numel / max(map(len, members))) / unit) * unit
    return Layout(members, length, numel)


def hierarchical(x: Tensor, link: Link, plan: Plan, residuals: Residuals | None = None) -> Steps:
    """All-reduce of ``x`` in place. ``plan.nodes``: the machine of every rank."""
    return algorithms.in_pieces(_hierarchical, x, link, plan, residuals)


def _hierarchical(flat: Tensor, link: Link, plan: Plan, residuals: Residuals | None) -> Going:
    here, exact = layout(flat.numel(), plan), Raw(flat.dtype)
    node = here.node(link.rank)
    inside = among(link, here.members[node])
    spans = here.spans(node)
    parts = [flat[span] for span in spans]
    mine = parts[inside.rank]
    total = torch.empty(mine.numel(), dtype=torch.float32, device=flat.device)
    yield from algorithms.reduce_leg(parts, [None] * len(parts), total, inside, exact)
    for number in here.held(node, link.rank):
        span, before = here.span(number, number), spans[inside.rank].start
        part = total[span.start - before : span.stop - before]
        between = among(link, [here.owner(each, number) for each in range(len(here.members))])
        memory = algorithms.part(residuals, number)
        yield from algorithms.flat(between.world)(part, between, plan, memory)
    mine.copy_(total)
    yield from algorithms.gather_leg(mine, None, parts, inside, exact)


def among(link: Link, ranks: Sequence[int]) -> Link:
    """A link that reaches only ``ranks``, this one among them, numbered in their order."""

    def exchange(sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Sequence[Transfer]:
        none = sends[0].new_empty(0)
        outbox, inbox = [none] * link.world, [none] * link.world
        for number, rank in enumerate(ranks):
            outbox[rank], inbox[rank] = sends[number], receives[number]
        return link.exchange(outbox, inbox)

    return Link(ranks.index(link.rank), len(ranks), exchange)


def sent_bytes(numel: int, rank: int, world: int, plan: Plan) -> int:
    """Bytes that ``rank`` sends, to its own machine and to others."""
    return sum(bytes_by_distance(numel, rank, plan))


def bytes_by_distance(numel: int, rank: int, plan: Plan) -> tuple[int, int]:
    """Bytes that ``rank`` sends: to ranks of its machine, to other machines."""
    inside = between = 0
    for first, last in pieces.cuts(numel, plan.piece):
        here = layout(last - first, plan)
        node = here.node(rank)
        sizes = [span.stop - span.start for span in here.spans(node)]
        mine = sizes[here.members[node].index(rank)]
        inside += plan.dtype.itemsize * (sum(sizes) - mine + (len(sizes) - 1) * mine)
        for span in (here.span(number, number) for number in here.held(node, rank)):
            between += algorithms.flat_bytes(span.stop - span.start, node, len(here.members), plan)
    return inside, between
