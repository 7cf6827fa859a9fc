"""All-reduce in two stages: over several machines, or over the two sockets of one whose GPUs have PCIe alone.

Over several machines it is exact inside each and quantized between them, where the link is slow.

Every machine sums its ranks' tensors, each of its ranks a slice of them; the ranks that hold the same slice on
different machines all-reduce it quantized; then each machine spreads the results. All machines hold equally many ranks.

The sum is ``sum(decode(encode(exact sum of a machine)) for machines)``, in the order of the ranks that hold the slice:
fewer roundings than one per rank, and the same bits everywhere, because all machines add the same payloads in the same
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codec import Raw
from ..codec.native import Received
from ..codec.recipes import Legs
from ..comm.buffers import Lengths
from ..comm.communicator import Call, Communicator, Transfer, Transport
from ..comm.simulated import Simulated
from .algorithms import Residuals, Steps, one_step, payloads_received, two_step
from .plan import Plan, cut, cut_plan, flat, piece_values, width_of

MORE_BITS = 2  # of what crosses between two sockets


class Subgroup:
    """Some of a communicator's ranks in ascending order, this one among them; and what carries their messages."""

    def __init__(self, comm: Communicator | Simulated, transport: Transport, ranks: Sequence[int]) -> None:
        self.rank, self.world = ranks.index(comm.rank), len(ranks)
        self.nodes, self.buffers = tuple(comm.nodes[rank] for rank in ranks), comm.buffers
        self._whole, self._ranks, self._transport = comm.world, ranks, transport

    def exchange(
        self, outbox: Tensor, out_sizes: Sequence[int], inbox: Tensor, in_sizes: Sequence[int], call: Call
    ) -> Transfer:
        """Send each of the ranks its part of ``outbox`` and receive from each its part of ``inbox``."""
        return self._transport.exchange(outbox, self._spread(out_sizes), inbox, self._spread(in_sizes), call)

    def gather(self, inbox: Tensor, own: Tensor, call: Call) -> Transfer:
        """Send the ranks ``own``, this rank's place in ``inbox``, and receive theirs."""
        sizes = [own.numel()] * self.world
        return self.exchange(own.repeat(self.world), sizes, inbox, sizes, call)

    def _spread(self, sizes: Sequence[int]) -> list[int]:
        """Sizes by rank of the whole communicator."""
        spread = [0] * self._whole
        for rank, size in zip(self._ranks, sizes, strict=True):
            spread[rank] = size
        return spread


def hierarchical(x: Tensor, out: Tensor, plan: Plan, call: Call, residuals: Residuals | None = None) -> Steps:
    """All-reduce of ``x`` in place."""
    slices, comm, exact = plan.intra_node, plan.comm, Raw(plan.dtype)
    assert slices is not None
    nodes, flat = comm.nodes, x.view(-1)
    intra_node = Subgroup(comm, plan.transport, [rank for rank, node in enumerate(nodes) if node == nodes[comm.rank]])
    mine = slices.of(flat)[intra_node.rank]
    sizes = [slices.size(rank) * plan.dtype.itemsize for rank in range(intra_node.world)]

    inbox = flat.new_empty(intra_node.world * mine.numel()).view(torch.uint8)  # exact reduce-scatter
    incoming = [sizes[intra_node.rank]] * intra_node.world
    yield intra_node.exchange(flat.view(torch.uint8), sizes, inbox, incoming, call)
    payloads = list(inbox.view(intra_node.world, sizes[intra_node.rank]).unbind())
    payloads[intra_node.rank] = mine.view(torch.uint8)
    dtype = plan.dtype if plan.dtype == torch.float16 else torch.float32  # a sum of float16 overflows here already
    total = torch.empty(mine.numel(), dtype=dtype, device=x.device)
    if plan.inter_node is not None:  # quantized all-reduce, where this rank has a slice
        exact.decode_sum(payloads, total)
        algorithm = one_step if plan.inter_node.algorithm == "one-step" else two_step
        yield from algorithm(total, total, plan.inter_node, call, residuals)

    mine.copy_(total)  # exact all-gather
    outgoing = mine.view(torch.uint8).repeat(intra_node.world)
    yield intra_node.exchange(outgoing, incoming, flat.view(torch.uint8), sizes, call)
    return x


def over_sockets(x: Tensor, out: Tensor, plan: Plan, call: Call, residuals: Residuals | None = None) -> Steps:
    """All-reduce of ``x`` in place, quantized: reduce inside the socket, exchange across, gather inside.

    The link between the sockets is the slowest, and a tensor crosses it once here, in one sum of each socket; nearly
    three times in two steps over all ranks. It costs a third rounding, of the sockets' sums, in two bits more: such a
    sum is as large as many parts, so its rounding would count as much as all of theirs (bench_accuracy.py sockets).
    """
    within, across, between, comm = plan.within, plan.across, plan.between, plan.comm
    assert within is not None and across is not None and between is not None
    (piece,), device = within.pieces, x.device
    mine, width = (piece.start, piece.end), piece.slices.width
    size = between.wire_bytes(piece.end - piece.start, width)
    near = comm.buffers.take(piece.lengths, device)
    far = comm.buffers.take(Lengths(0, 0, across.world * size, size, across.rank * size), device)
    lost = [None, None, None] if residuals is None else residuals.of_sockets(x, piece, plan)
    plan.reduce.encode_slices(x, piece.slices, near.outbox, lost[0])
    yield within.transport.exchange(near.outbox, piece.sizes, near.inbox, piece.incoming, call)
    received = payloads_received(near, piece, within)
    plan.reduce.reduce_slices(received, x, between, far.own, lost[1], width, mine)
    yield across.gather(far.gathered, far.own, call)
    received = Received(far.gathered, size, across.world)
    between.reduce_slices(received, x, plan.gather, near.own, lost[2], width, mine)
    yield within.transport.gather(near.gathered, near.own, call)
    plan.gather.decode_slices(near.gathered, piece.slices, x)
    comm.buffers.give_back(near)
    comm.buffers.give_back(far)
    return x


# ---- cuts -------------------------------------------------------------------------------------------------------


def cut_machines(plan: Plan, numel: int, width: int, unit: int, device: torch.device) -> Plan:
    """``plan`` over several machines."""
    comm, nodes = plan.comm, plan.comm.nodes
    node_ranks = [rank for rank, node in enumerate(nodes) if node == nodes[comm.rank]]
    place = node_ranks.index(comm.rank)
    peers = sorted([rank for rank, each in enumerate(nodes) if each == node][place] for node in set(nodes))
    intra_node = cut(numel, width, len(node_ranks), unit)
    mine = intra_node.size(place)
    shape = (mine // width, width) if mine > width else (mine,)
    subgroup: Any = Subgroup(comm, plan.transport, peers)
    within = (intra_node.numel - mine + (len(node_ranks) - 1) * mine) * plan.dtype.itemsize
    if not mine:
        return plan._replace(intra_node=intra_node, wire_bytes=within)
    inter_node = plan._replace(comm=subgroup, transport=subgroup, algorithm=flat(len(peers)))
    transport = comm.transport_name(device, plan.config)
    inter_node = cut_plan(inter_node, shape, device, piece_values(inter_node, transport, mine * plan.dtype.itemsize))
    sent = inter_node.wire_bytes
    return plan._replace(intra_node=intra_node, inter_node=inter_node, wire_bytes=within + sent, remote_bytes=sent)


def cut_sockets(plan: Plan, numel: int, width: int, unit: int, device: torch.device) -> Plan:
    """``plan`` over two sockets; in two steps where a rank of a socket would have no slice."""
    comm, sockets = plan.comm, plan.comm.gpus.sockets
    near = [rank for rank, each in enumerate(sockets) if each == sockets[comm.rank]]
    place, slices = near.index(comm.rank), cut(numel, width, len(near), unit)
    rows, mine = (numel // width, width), slices.size(place)
    if not slices.size(len(near) - 1):
        return cut_plan(plan._replace(algorithm="two-step"), rows, device, 0)
    pair = sorted([rank for rank, each in enumerate(sockets) if each == socket][place] for socket in (0, 1))
    subgroup: Any = Subgroup(comm, plan.transport, near)
    within = cut_plan(plan._replace(comm=subgroup, transport=subgroup, algorithm="two-step"), rows, device, 0)
    bits = min(width_of(plan.config, Legs(plan.reduce, plan.gather)) + MORE_BITS, 8)
    between, across = plan.config.legs_of(bits).reduce, Subgroup(comm, plan.transport, pair)
    sent = within.wire_bytes + between.wire_bytes(mine, width)
    return plan._replace(within=within, across=across, between=between, wire_bytes=sent)
