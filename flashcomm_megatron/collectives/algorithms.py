"""The algorithms of the collectives: what each rank computes between exchanges, whatever moves the bytes.

- **two-step all_reduce** (Flash Communication, arXiv 2412.04964, algorithm 1): every rank sends each peer its slice,
  encoded; the owner decodes, sums in float32 in rank order and encodes the sum; everybody gathers and decodes.
- **one-step all_reduce** (Hansen-Palmus et al., arXiv 2411.09510): everybody gathers the encoded partial sums and adds
  them. One rounding instead of two, world / 2 times the bytes.
- **reduce_scatter** and **all_gather** are the two halves of two-step.

Codec calls are batched: three and two exchanges for a two-step sum, two and one for the others, for any number of
ranks. Each algorithm is a generator that yields the transfers it has to wait for. Run to its end it is a blocking
collective; on a thread or stream of its own an asynchronous one; N of them in turns are N ranks in one process
(comm/simulated.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress

import torch
from torch import Tensor

from ..codec.native import Received
from ..comm.communicator import Call, Transfer
from .plan import Piece, Plan

Steps = Generator[Transfer, None, Tensor]  # returns the collective's result
PieceSteps = Generator[Transfer, None, None]  # of one piece


class Residuals:
    """The rounding errors of this rank's last call, to be added to its next contribution (feedback.py).

    Made by the first collective that is handed them; later ones must have the same shape, dtype, device and codecs,
    which alone know what the numbers mean. Those of a leg's slices lie one behind the other.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str], Tensor] = {}  # by piece and leg

    def of(self, piece: int, leg: str, numel: int, like: Tensor) -> Tensor:
        """The ``numel`` numbers of one leg ("reduce" or "gather") of a piece; zeros at first."""
        found = self.kept.get((piece, leg))
        if found is None:
            found = self.kept[piece, leg] = like.new_zeros(numel)
        if found.numel() != numel:
            raise ValueError(
                f"residuals: the {leg} leg remembers {found.numel()} numbers, this tensor takes {numel}; start with "
                "new Residuals() where shape, world or codec change."
            )
        return found


# ---- all_reduce -------------------------------------------------------------------------------------------------


def one_step(x: Tensor, out: Tensor, plan: Plan, call: Call, residuals: Residuals | None = None) -> Steps:
    """All-reduce of ``x`` in place."""
    yield from pipelined(_one_step, x.view(-1), plan, call, residuals)
    return x


def _one_step(x: Tensor, piece: Piece, number: int, plan: Plan, call: Call, residuals: Residuals | None) -> PieceSteps:
    rank, world, size = plan.comm.rank, plan.comm.world, piece.sizes[0]
    inbox = torch.empty(world * size, dtype=torch.uint8, device=x.device)
    residual = (
        None if residuals is None else residuals.of(number, "reduce", plan.reduce.residual_numel_of(piece.slices), x)
    )
    plan.reduce.encode_slices(x, piece.slices, inbox[rank * size : (rank + 1) * size], residual)
    yield plan.transport.gather(inbox, size, call)
    plan.reduce.reduce_slices(Received(inbox, size, world), x, width=piece.slices.width)


def two_step(x: Tensor, out: Tensor, plan: Plan, call: Call, residuals: Residuals | None = None) -> Steps:
    """All-reduce of ``x`` in place."""
    yield from pipelined(_two_step, x.view(-1), plan, call, residuals)
    return x


def _two_step(x: Tensor, piece: Piece, number: int, plan: Plan, call: Call, residuals: Residuals | None) -> PieceSteps:
    rank, world, slices = plan.comm.rank, plan.comm.world, piece.slices
    residual = None if residuals is None else residuals.of(number, "reduce", plan.reduce.residual_numel_of(slices), x)
    outbox = torch.empty(sum(piece.sizes), dtype=torch.uint8, device=x.device)
    plan.reduce.encode_slices(x, slices, outbox, residual)
    inbox = outbox.new_empty(world * piece.sizes[rank])
    yield plan.transport.exchange(outbox, piece.sizes, inbox, piece.incoming, call)
    payloads, size = _received(inbox, outbox, piece, plan), piece.gather_size

    gathered = outbox.new_empty(world * size)
    mine = x[piece.start : piece.end]
    own = gathered[rank * size : rank * size + piece.own_size]
    residual = (
        None
        if residuals is None
        else residuals.of(number, "gather", plan.gather.residual_numel(mine.numel(), slices.width), x)
    )
    plan.reduce.reduce_slices(payloads, mine, plan.gather, own, residual, slices.width)
    yield plan.transport.gather(gathered, size, call)
    plan.gather.decode_slices(gathered, slices, x)


# ---- halves -----------------------------------------------------------------------------------------------------


def reduce_scatter(x: Tensor, out: Tensor, plan: Plan, call: Call, residuals: Residuals | None = None) -> Steps:
    """Sum of every rank's ``x``, this rank's slice of it in ``out``."""
    (piece,), flat = plan.pieces, x.view(-1)
    residual = (
        None if residuals is None else residuals.of(0, "reduce", plan.reduce.residual_numel_of(piece.slices), flat)
    )
    outbox = torch.empty(sum(piece.sizes), dtype=torch.uint8, device=x.device)
    plan.reduce.encode_slices(flat, piece.slices, outbox, residual)
    inbox = torch.empty_like(outbox)
    yield plan.transport.exchange(outbox, piece.sizes, inbox, piece.incoming, call)
    plan.reduce.reduce_slices(_received(inbox, outbox, piece, plan), out.view(-1), width=piece.slices.width)
    return out


def all_gather(x: Tensor, out: Tensor, plan: Plan, call: Call, residuals: Residuals | None = None) -> Steps:
    """Every rank's ``x`` in rank order, in ``out``."""
    (piece,), flat = plan.pieces, x.view(-1)
    rank, size, whole = plan.comm.rank, piece.gather_size, piece.slices
    inbox = torch.empty(plan.comm.world * size, dtype=torch.uint8, device=x.device)
    mine = whole._replace(numel=whole.length, world=1)
    plan.gather.encode_slices(flat, mine, inbox[rank * size : (rank + 1) * size])
    yield plan.transport.gather(inbox, size, call)
    plan.gather.decode_slices(inbox, whole, out.view(-1))
    return out


# ---- pieces -----------------------------------------------------------------------------------------------------


def pipelined(
    algorithm: Callable[..., PieceSteps], x: Tensor, plan: Plan, call: Call, residuals: Residuals | None
) -> PieceSteps:
    """Run ``algorithm`` on every piece of flat ``x``, all at once.

    All pieces are started first, so that the link is busy from the first piece's encoding to the last one's decoding;
    then each goes on in turn, as its messages arrive.
    """
    if len(plan.pieces) == 1:
        return (yield from algorithm(x, plan.pieces[0], 0, plan, call, residuals))
    under_way: deque[tuple[PieceSteps, Transfer]] = deque()
    for number, piece in enumerate(plan.pieces):
        legs = algorithm(x[piece.first : piece.last], piece, number, plan, call, residuals)
        under_way.append((legs, next(legs)))
    while under_way:
        legs, transfer = under_way.popleft()
        yield transfer
        with suppress(StopIteration):
            under_way.append((legs, next(legs)))


def _received(inbox: Tensor, outbox: Tensor, piece: Piece, plan: Plan) -> Received:
    """The payloads of this rank's slice by rank; its own is still where it was encoded."""
    rank = plan.comm.rank
    return Received(inbox, piece.incoming[0], plan.comm.world, rank, outbox, rank * piece.sizes[0])


def fused_residuals(x: Tensor, plan: Plan, residuals: Residuals | None) -> list[Tensor]:
    """The residuals of the reduce and the gather leg, which a fused kernel reads and replaces; none without any.

    Those of the algorithm above over a tensor in one piece. A leg that is not there has an empty one.
    """
    if residuals is None:
        return []
    (piece,), flat = plan.pieces, x.view(-1)
    found = [residuals.of(0, "reduce", plan.reduce.residual_numel_of(piece.slices), flat), flat[:0]]
    if plan.algorithm == "two-step":
        numel = plan.gather.residual_numel(piece.end - piece.start, piece.slices.width)
        found[1] = residuals.of(0, "gather", numel, flat)
    return found
