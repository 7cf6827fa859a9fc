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

from torch import Tensor

from ..codec.base import Slices
from ..codec.native import Received
from ..comm.buffers import Boxes
from ..comm.communicator import Call, Transfer
from .plan import Piece, Plan

Steps = Generator[Transfer, None, Tensor]  # returns the collective's result


class Residuals:
    """The rounding errors of this rank's last call, to be added to its next contribution (feedback.py).

    Made by the first collective that is handed them; later ones must have the same shape, dtype, device and codecs,
    which alone know what the numbers mean. Those of a leg's slices lie one behind the other.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str], Tensor] = {}  # by piece and leg

    def of_reduce(self, x: Tensor, piece: Piece, number: int, plan: Plan) -> Tensor:
        """Those of all slices of piece ``number``, which is ``x``; zeros at first."""
        return self._of(number, "reduce", plan.reduce.residual_numel_of(piece.slices), x)

    def of_gather(self, x: Tensor, piece: Piece, number: int, plan: Plan) -> Tensor:
        """Those of this rank's slice of the sum."""
        return self._of(number, "gather", plan.gather.residual_numel(piece.end - piece.start, piece.slices.width), x)

    def of_sockets(self, x: Tensor, piece: Piece, plan: Plan) -> list[Tensor]:
        """Those of the three roundings of a sum over sockets (hierarchical.py)."""
        numel, width = piece.end - piece.start, piece.slices.width
        assert plan.between is not None
        across = self._of(0, "across", plan.between.residual_numel(numel, width), x)
        return [self.of_reduce(x, piece, 0, plan), across, self.of_gather(x, piece, 0, plan)]

    def _of(self, piece: int, leg: str, numel: int, like: Tensor) -> Tensor:
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
    return pipelined(_one_step, x, plan, call, residuals)


def _one_step(x: Tensor, piece: Piece, number: int, plan: Plan, call: Call, residuals: Residuals | None) -> Steps:
    boxes = plan.comm.buffers.take(piece.lengths, x.device)
    residual = None if residuals is None else residuals.of_reduce(x, piece, number, plan)
    plan.reduce.encode_slices(x, piece.slices, boxes.own, residual)
    yield plan.transport.gather(boxes.gathered, boxes.own, call)
    received = Received(boxes.gathered, piece.sizes[0], plan.comm.world)
    plan.reduce.reduce_slices(received, x, width=piece.slices.width)
    plan.comm.buffers.give_back(boxes)
    return x


def two_step(x: Tensor, out: Tensor, plan: Plan, call: Call, residuals: Residuals | None = None) -> Steps:
    """All-reduce of ``x`` in place."""
    return pipelined(_two_step, x, plan, call, residuals)


def _two_step(x: Tensor, piece: Piece, number: int, plan: Plan, call: Call, residuals: Residuals | None) -> Steps:
    boxes, slices = plan.comm.buffers.take(piece.lengths, x.device), piece.slices
    residual = None if residuals is None else residuals.of_reduce(x, piece, number, plan)
    plan.reduce.encode_slices(x, slices, boxes.outbox, residual)
    yield plan.transport.exchange(boxes.outbox, piece.sizes, boxes.inbox, piece.incoming, call)

    residual = None if residuals is None else residuals.of_gather(x, piece, number, plan)
    received, mine = payloads_received(boxes, piece, plan), (piece.start, piece.end)
    plan.reduce.reduce_slices(received, x, plan.gather, boxes.own, residual, slices.width, mine)
    yield plan.transport.gather(boxes.gathered, boxes.own, call)
    plan.gather.decode_slices(boxes.gathered, slices, x)
    plan.comm.buffers.give_back(boxes)
    return x


# ---- halves -----------------------------------------------------------------------------------------------------


def reduce_scatter(x: Tensor, out: Tensor, plan: Plan, call: Call, residuals: Residuals | None = None) -> Steps:
    """Sum of every rank's ``x``, this rank's slice of it in ``out``."""
    (piece,) = plan.pieces
    boxes = plan.comm.buffers.take(piece.lengths, x.device)
    residual = None if residuals is None else residuals.of_reduce(x, piece, 0, plan)
    plan.reduce.encode_slices(x, piece.slices, boxes.outbox, residual)
    yield plan.transport.exchange(boxes.outbox, piece.sizes, boxes.inbox, piece.incoming, call)
    plan.reduce.reduce_slices(payloads_received(boxes, piece, plan), out, width=piece.slices.width)
    plan.comm.buffers.give_back(boxes)
    return out


def all_gather(x: Tensor, out: Tensor, plan: Plan, call: Call, residuals: Residuals | None = None) -> Steps:
    """Every rank's ``x`` in rank order, in ``out``."""
    (piece,) = plan.pieces
    boxes, whole = plan.comm.buffers.take(piece.lengths, x.device), piece.slices
    mine = Slices(whole.length, whole.width, whole.length, 1)
    plan.gather.encode_slices(x, mine, boxes.own)
    yield plan.transport.gather(boxes.gathered, boxes.own, call)
    plan.gather.decode_slices(boxes.gathered, whole, out)
    plan.comm.buffers.give_back(boxes)
    return out


# ---- pieces -----------------------------------------------------------------------------------------------------


def pipelined(algorithm: Callable[..., Steps], x: Tensor, plan: Plan, call: Call, residuals: Residuals | None) -> Steps:
    """Run ``algorithm`` on every piece of ``x``, all at once; its result is ``x``."""
    if len(plan.pieces) == 1:
        return algorithm(x, plan.pieces[0], 0, plan, call, residuals)
    return _in_turns(algorithm, x, plan, call, residuals)


def _in_turns(algorithm: Callable[..., Steps], x: Tensor, plan: Plan, call: Call, residuals: Residuals | None) -> Steps:
    """All pieces are started first, so that the link is busy from the first one's encoding to the last one's decoding;
    then each goes on in turn, as its messages arrive.

    On GPUs that needs no stream of ours: NCCL's asynchronous collectives run on a stream of its own, which waits for
    what the current one holds when they are started, and the current one waits for a piece's messages only when its
    turn has come. So piece 2 is encoded while piece 1 travels.
    """
    under_way: deque[tuple[Steps, Transfer]] = deque()
    flat = x.view(-1)
    for number, piece in enumerate(plan.pieces):
        legs = algorithm(flat[piece.first : piece.last], piece, number, plan, call, residuals)
        under_way.append((legs, next(legs)))
    while under_way:
        legs, transfer = under_way.popleft()
        yield transfer
        with suppress(StopIteration):
            under_way.append((legs, next(legs)))
    return x


def payloads_received(boxes: Boxes, piece: Piece, plan: Plan) -> Received:
    """The payloads of this rank's slice by rank; its own is still where it was encoded."""
    rank = plan.comm.rank
    return Received(boxes.inbox, piece.incoming[0], plan.comm.world, rank, boxes.outbox, rank * piece.sizes[0])


def fused_residuals(x: Tensor, plan: Plan, residuals: Residuals | None) -> list[Tensor]:
    """The residuals of the reduce and the gather leg, which a fused kernel reads and replaces; none without any.

    Those of the algorithm above over a tensor in one piece. A leg that is not there has an empty one.
    """
    if residuals is None:
        return []
    (piece,) = plan.pieces
    has_gather = plan.algorithm == "two-step"
    gather = residuals.of_gather(x, piece, 0, plan) if has_gather else x.new_empty(0)
    return [residuals.of_reduce(x, piece, 0, plan), gather]
