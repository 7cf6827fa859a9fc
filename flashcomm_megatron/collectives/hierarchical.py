"""All-reduce over several machines: exact inside each, quantized between them, where the link is slow.

Every machine sums its ranks' tensors, each of its ranks a slice of them; the ranks that hold the same slice on
different machines all-reduce it quantized; then each machine spreads the results. All machines hold equally many ranks.

The sum is ``sum(decode(encode(exact sum of a machine)) for machines)``, in the order of the ranks that hold the slice:
fewer roundings than one per rank, and the same bits everywhere, because all machines add the same payloads in the same
order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codec import Raw
from ..comm.communicator import Call, Communicator, Transfer, Transport
from ..comm.simulated import Simulated
from .algorithms import Residuals, Steps, one_step, two_step
from .plan import Plan


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
