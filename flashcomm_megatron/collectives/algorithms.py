"""The algorithms of the collectives: what each rank computes between exchanges, whatever moves the bytes.

- **two-step all_reduce** (Flash Communication, arXiv 2412.04964, algorithm 1): every rank sends each peer its slice,
  encoded; the owner decodes, sums in float32 in rank order and encodes the sum; everybody gathers and decodes.
- **one-step all_reduce** (Hansen-Palmus et al., arXiv 2411.09510): everybody gathers the encoded partial sums and adds
  them. One rounding instead of two, world / 2 times the bytes.
- **reduce_scatter** and **all_gather** are the two halves of two-step.

Large tensors are cut into pieces that are under way together (pieces.py). Each algorithm is a generator that yields the
transfers it has to wait for. Run to its end it is a blocking collective; started and left at its first transfer it is
an asynchronous one; N of them in turns are N ranks in one process (transport/lockstep.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..codec import Codec
from ..comm.link import Link, Transfer
from . import pieces
from .plan import ONE_STEP_WORLD, Plan

Going = Generator[Sequence[Transfer], None, None]
Steps = Generator[Sequence[Transfer], None, Tensor]
Memories = Sequence[Tensor | None]


@dataclass
class Residuals:
    """What this rank's last roundings lost, by leg, to be added to its next contribution (feedback.py).

    Made by the first collective that is handed them; later ones must have the same shape, dtype, device and codecs,
    which alone know what the numbers mean. Those of a leg's slices lie one behind the other.
    """

    reduce: Tensor | None = None
    gather: Tensor | None = None
    parts: dict[int, Residuals] = field(default_factory=dict)  # of the tensor's pieces


def one_step(x: Tensor, link: Link, plan: Plan, residuals: Residuals | None = None) -> Steps:
    """All-reduce of ``x`` in place."""
    return in_pieces(_one_step, x, link, plan, residuals)


def two_step(x: Tensor, link: Link, plan: Plan, residuals: Residuals | None = None) -> Steps:
    """All-reduce of ``x`` in place."""
    return in_pieces(_two_step, x, link, plan, residuals)


def reduce_scatter(x: Tensor, out: Tensor, link: Link, plan: Plan, residuals: Residuals | None = None) -> Steps:
    """Sum of every rank's ``x``, this rank's slice of it in ``out``."""
    slices = x.view(-1).chunk(link.world)
    yield from pieces.together(
        _reduce_scatter(
            [each[first:last] for each in slices], out.view(-1)[first:last], link, plan, part(residuals, number)
        )
        for number, (first, last) in enumerate(pieces.cuts(out.numel(), plan.piece))
    )
    return out


def all_gather(x: Tensor, out: Tensor, link: Link, plan: Plan) -> Steps:
    """Every rank's ``x`` in rank order, in ``out``."""
    return gather_in_pieces(_all_gather, x, out, link, plan)


def in_pieces(algorithm: Callable[..., Going], x: Tensor, link: Link, plan: Plan, residuals: Residuals | None) -> Steps:
    """Run ``algorithm``, an all-reduce in place of a 1-D tensor, on every piece of ``x``."""
    flat = x.view(-1)
    yield from pieces.together(
        algorithm(flat[first:last], link, plan, part(residuals, number))
        for number, (first, last) in enumerate(pieces.cuts(flat.numel(), plan.piece))
    )
    return x


def gather_in_pieces(algorithm: Callable[..., Going], x: Tensor, out: Tensor, link: Link, plan: Plan) -> Steps:
    """Run ``algorithm``, an all-gather of a 1-D tensor into one for each rank, on every piece of ``x``."""
    flat, slices = x.view(-1), out.view(-1).chunk(link.world)
    yield from pieces.together(
        algorithm(flat[first:last], [each[first:last] for each in slices], link, plan)
        for first, last in pieces.cuts(flat.numel(), plan.piece)
    )
    return out


def flat(world: int) -> Callable[..., Going]:
    """The all-reduce in place of a whole 1-D tensor that suits ``world`` ranks."""
    return _one_step if world <= ONE_STEP_WORLD else _two_step


def _one_step(flat: Tensor, link: Link, plan: Plan, residuals: Residuals | None) -> Going:
    inbox = _inbox(plan.reduce, flat, link)
    (memory,) = memories(residuals, "reduce", plan.reduce, [flat])
    encode(plan.reduce, flat, memory, inbox[link.rank])
    yield link.exchange([inbox[link.rank]] * link.world, inbox)
    plan.reduce.decode_sum(inbox, flat)


def _reduce_scatter(slices: list[Tensor], mine: Tensor, link: Link, plan: Plan, residuals: Residuals | None) -> Going:
    lost = memories(residuals, "reduce", plan.reduce, slices)
    return reduce_leg(slices, lost, mine, link, plan.reduce)


def _all_gather(mine: Tensor, slices: list[Tensor], link: Link, plan: Plan) -> Going:
    return gather_leg(mine, None, slices, link, plan.gather)


def _two_step(flat: Tensor, link: Link, plan: Plan, residuals: Residuals | None) -> Going:
    length = slice_length(flat.numel(), link.world, plan)
    slices = _slices(flat, length, link)
    mine = slices[link.rank]
    lost = memories(residuals, "reduce", plan.reduce, slices)
    yield from reduce_leg(slices, lost, mine, link, plan.reduce)
    (memory,) = memories(residuals, "gather", plan.gather, [mine])
    yield from gather_leg(mine, memory, slices, link, plan.gather)


def reduce_leg(slices: list[Tensor], lost: Memories, mine: Tensor, link: Link, codec: Codec) -> Going:
    """Send every rank its slice; write the sum of what all ranks sent here into ``mine``."""
    outbox = [encode(codec, each, memory) for each, memory in zip(slices, lost, strict=True)]
    inbox = _inbox(codec, mine, link)
    inbox[link.rank] = outbox[link.rank]
    yield link.exchange(outbox, inbox)
    codec.decode_sum(inbox, mine)


def gather_leg(mine: Tensor, memory: Tensor | None, slices: list[Tensor], link: Link, codec: Codec) -> Going:
    """Send ``mine`` to every rank; decode what rank r sent, also this one, into ``slices[r]``."""
    payload = encode(codec, mine, memory)
    inbox = [payload.new_empty(codec.wire_bytes(part.numel())) for part in slices]
    inbox[link.rank] = payload
    yield link.exchange([payload] * link.world, inbox)
    for part, received in zip(slices, inbox, strict=True):
        codec.decode_sum([received], part)


def encode(codec: Codec, x: Tensor, memory: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The payload of ``x``, or of ``x`` and what the last one lost, which then becomes what this one loses."""
    return codec.encode(x, out, memory)


def part(residuals: Residuals | None, number: int) -> Residuals | None:
    """The memory of one piece of the tensor."""
    return None if residuals is None else residuals.parts.setdefault(number, Residuals())


def memories(residuals: Residuals | None, leg: str, codec: Codec, parts: Sequence[Tensor]) -> Memories:
    """What was lost so far in ``leg`` ("reduce" or "gather") of every part, zeros at first; Nones without residuals."""
    if residuals is None:
        return [None] * len(parts)
    sizes = [codec.residual_numel(each.numel()) for each in parts]
    if getattr(residuals, leg) is None:
        setattr(residuals, leg, parts[0].new_zeros(sum(sizes)))
    found: Tensor = getattr(residuals, leg)
    if found.numel() != sum(sizes):
        raise ValueError(
            f"residuals: the {leg} leg remembers {found.numel()} numbers, this tensor takes {sum(sizes)}; start with "
            "new Residuals() where shape, world or codec change."
        )
    return list(torch.split(found, sizes))


def fused_memories(kind: str, x: Tensor, rank: int, world: int, plan: Plan, residuals: Residuals) -> list[Tensor]:
    """What a fused collective carries on and replaces: the memories of the reduce and the gather leg, here made alike.

    They are those of the algorithm of that kind above over tensors that are not cut into pieces. A leg that is not
    there has an empty one.
    """
    flat, memory = x.view(-1), residuals.parts.setdefault(0, Residuals())
    length = slice_length(flat.numel(), world, plan)
    parts = {"one-step": [flat], "two-step": torch.split(flat, length), "reduce_scatter": flat.chunk(world)}[kind]
    memories(memory, "reduce", plan.reduce, parts)
    if kind == "two-step":
        memories(memory, "gather", plan.gather, [flat[rank * length : (rank + 1) * length]])
    return [flat[:0] if each is None else each for each in (memory.reduce, memory.gather)]


def _slices(flat: Tensor, length: int, link: Link) -> list[Tensor]:
    """Cut [n] into one slice a rank; the last ones may be short or empty."""
    return [flat[rank * length : (rank + 1) * length] for rank in range(link.world)]


def _inbox(codec: Codec, values: Tensor, link: Link) -> list[Tensor]:
    """One empty payload per rank, each for as many values as ``values`` has."""
    size = codec.wire_bytes(values.numel())
    return [torch.empty(size, dtype=torch.uint8, device=values.device) for _ in range(link.world)]


# ---- bytes ------------------------------------------------------------------------------------------------------


def flat_bytes(numel: int, rank: int, world: int, plan: Plan) -> int:
    """Bytes that ``rank`` sends in what :func:`flat` returns."""
    if world <= ONE_STEP_WORLD:
        return (world - 1) * plan.reduce.wire_bytes(numel)
    return _two_step_bytes(numel, rank, world, plan)


def wire_bytes(codec: Codec, numel: int, piece: int) -> int:
    """Bytes of the payloads of ``numel`` values in pieces."""
    return sum(codec.wire_bytes(last - first) for first, last in pieces.cuts(numel, piece))


def reduce_scatter_bytes(numel: int, rank: int, world: int, plan: Plan) -> int:
    """Bytes that ``rank`` sends; ``numel``: values of a slice."""
    return (world - 1) * wire_bytes(plan.reduce, numel, plan.piece)


def all_gather_bytes(numel: int, rank: int, world: int, plan: Plan) -> int:
    """Bytes that ``rank`` sends; ``numel``: values of a slice."""
    return (world - 1) * wire_bytes(plan.gather, numel, plan.piece)


def slice_length(numel: int, world: int, plan: Plan) -> int:
    """Values of a two-step slice: a multiple of both legs' blocks; the last ranks' slices may be short or empty."""
    unit = math.lcm(plan.reduce.block, plan.gather.block)
    return math.ceil(math.ceil(numel / world) / unit) * unit


def one_step_bytes(numel: int, rank: int, world: int, plan: Plan) -> int:
    """Bytes that ``rank`` sends."""
    return (world - 1) * wire_bytes(plan.reduce, numel, plan.piece)


def two_step_bytes(numel: int, rank: int, world: int, plan: Plan) -> int:
    """Bytes that ``rank`` sends: every other rank its slice, then this rank's slice to each of them."""
    cuts = pieces.cuts(numel, plan.piece)
    return sum(_two_step_bytes(last - first, rank, world, plan) for first, last in cuts)


def _two_step_bytes(numel: int, rank: int, world: int, plan: Plan) -> int:
    length = slice_length(numel, world, plan)
    sizes = [min(max(numel - peer * length, 0), length) for peer in range(world)]
    reduce = sum(plan.reduce.wire_bytes(size) for peer, size in enumerate(sizes) if peer != rank)
    return reduce + (world - 1) * plan.gather.wire_bytes(sizes[rank])
