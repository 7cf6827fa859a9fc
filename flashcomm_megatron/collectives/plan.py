"""The one decision about a call: compress it or not, and if so, all that does not depend on its values.

Every rank must take the same branch or the job hangs, so a plan is a pure function of the collective, the shape, the
dtype, the kind of device, the ranks' places and the configuration: never of data, addresses or anything that failed
locally. Plans are kept with the communicator; a call that was made before costs one lookup.

Cuts
----
A tensor [..., H] is rows of H values. Slices end at row ends, as many rows to a rank as evenly as can be, so the last
ranks may have fewer or none. A tensor of one row is cut at multiples of what its codecs encode together. Large tensors
are summed in pieces, each by the whole algorithm, so that encoding, sending and decoding overlap.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..codec import Codec, Raw
from ..codec.base import Slices
from ..codec.recipes import RECIPES, Legs
from ..comm import fused
from ..comm.buffers import Lengths
from ..comm.communicator import Call, Communicator, Transport
from ..comm.simulated import Simulated
from ..config import Config
from ..observe.location import Location
from . import agreement
from .minimum_size import NEVER, Case, minimum_size, topology_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Values of a piece whose messages go to one peer. Over a process group two milliseconds at 1 Gbit/s; through shared
# memory only what exceeds the cache is cut.
PIECE = {"shared memory": 2048 * 1024, "cpu": 512 * 1024}

# On GPUs n pieces hide all but 1/n of the codec's work behind NCCL or the reverse, and cost n - 1 times the launches
# of one: n is best where n * n times the launches take as long as the codec. So n is the root of the tensor's bytes in
# units of what a codec does during them: 80 MiB, with which no GPU and link of the planner's loses by pieces.
GPU_UNIT = 80 << 20

# From how many bytes on a sum over two sockets of PCIe goes in three stages: one exchange more, a third of the bytes on
# the link between them, by the planner's rates (docs/log.md).
SOCKETS_BYTES = 4 << 20

# Torch's codec takes longer on a GPU than it saves, so a missing compiler makes nobody slower. Whoever sets a minimum
# size decides for himself.
NO_KERNELS = "no CUDA kernels in the extension of some rank: install the CUDA wheel, or nvcc and then pip install -e ."
NO_KERNELS_FOR = "no CUDA kernels for {}: --flash-comm-min-bytes 0 compresses without, slower"

PLANS = 4096  # kept for a group
TITLE = 47  # characters of a call's title; a frame in shared memory holds as many (csrc/cpu/streams.h)

# One-step moves world / 2 times the bytes of two-step, but in one exchange instead of two.
ONE_STEP_WORLD = 2

Site = Location  # where a collective runs: samples are filed under its kind, errors say its name


class Piece(NamedTuple):
    """The values first .. last - 1 of a flat tensor, and the bytes of their payloads."""

    first: int
    last: int
    slices: Slices
    sizes: tuple[int, ...]  # payload of each rank's slice on the reduce leg
    incoming: tuple[int, ...]  # payloads of this rank's slice, from each rank
    start: int  # this rank's slice of the piece
    end: int
    gather_size: int  # payload of the longest slice on the gather leg: all ranks send as much
    lengths: Lengths  # of what is sent and received


class Plan(NamedTuple):
    """What a call will do. ``deferred``: None, or why it is left to the original collective."""

    deferred: str | None
    kind: str
    comm: Communicator | Simulated
    transport: Transport
    config: Config
    algorithm: str  # a key of ALGORITHMS
    reduce: Codec
    gather: Codec
    dtype: torch.dtype
    label: str  # what error samples are filed under
    title: str  # what errors and messages call it
    noted: str  # what must be the same on every rank, in words (comm/stalls.py)
    check: int
    seconds: float
    minimum: int  # bytes from which on compression pays
    exact_bytes: int  # sent by this rank if uncompressed
    wire_bytes: int = 0  # sent by this rank
    remote_bytes: int = 0  # of these, to other machines
    pieces: tuple[Piece, ...] = ()
    intra_node: Slices | None = None  # hierarchical: slices of this rank's machine
    inter_node: Plan | None = None  # hierarchical: of the sum over machines
    within: Plan | None = None  # sockets: of the sum in this rank's socket
    across: Transport | None = None  # sockets: to the rank of the other one that holds the same slice
    between: Codec | None = None  # sockets: of what crosses

    def call(self) -> Call:
        """The next call of this plan."""
        self.comm.number += 1
        return Call(self.comm.number, self.title, self.check, self.seconds)


def decide(
    kind: str,
    x: Tensor,
    group: dist.ProcessGroup,
    config: Config,
    site: Site | None = None,
    legs: Legs | None = None,
    by_row: bool = False,
) -> Plan:
    """The plan for ``kind`` ("all_reduce", "reduce_scatter", "all_gather") over ``x``.

    ``legs``: codecs of this site alone, where the recipe is calibrated or ``x`` is a gradient. A group's first decision
    compares the ranks' configurations, deferred or not (agreement.py). ``by_row``: how many rows there are decides
    nothing, so a row of any size is compressed, or of at least the ``min_bytes`` that were asked for.
    """
    comm = Communicator.of(group)
    if x.is_cuda:
        fused.raise_errors(group)
    if not comm.agreed or comm.agreed[-1] is not config:
        agreement.check(comm, config)
    at = site.kind if site is not None else None
    shape = x.shape if kind != "all_to_all" else x.shape[1:]  # where every rank has as many rows as it happens to have
    key = kind, shape, x.dtype, x.device, config.text, at, legs, by_row
    found: Plan | None = comm.plans.get(key)
    if found is None:
        found = plan(kind, shape, x.dtype, x.device, comm, config, at, legs, by_row)
        if len(comm.plans) >= PLANS:
            comm.plans.clear()
        comm.plans[key] = found
    comm.calls.note(found.noted)
    return found


def plan(
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    comm: Communicator | Simulated,
    config: Config,
    site_kind: str | None = None,
    legs: Legs | None = None,
    by_row: bool = False,
) -> Plan:
    """The plan for a tensor of ``shape``; of an all_gather, of one rank's part; of an all_to_all, of a row.

    ValueError if a reduce_scatter does not divide, deferred or not.
    """
    if kind == "reduce_scatter" and (not shape or shape[0] % comm.world):
        raise ValueError(f"reduce_scatter: first dimension of {list(shape)} is not a multiple of {comm.world} ranks.")
    transport, exact = comm.transport_name(device, config), math.prod(shape) * dtype.itemsize
    if by_row:  # a row decides, whatever their number
        row = dtype.itemsize * (shape[-1] if shape else 1)
        minimum = 0 if row >= (config.min_bytes or 0) else NEVER
    else:
        minimum = _minimum(kind, dtype, transport, comm, config, legs)
    deferred = _reason(kind, exact, dtype, comm.world, minimum, by_row)
    recipe = RECIPES[config.recipe]
    if recipe.calibrated and legs is None and kind in ("all_reduce", "reduce_scatter"):
        deferred = "no calibrated site"
    legs = legs or config.legs
    algorithm = _algorithm(comm, transport, exact, config, by_row) if kind == "all_reduce" else kind
    if not deferred and transport == "cuda" and config.min_bytes is None:
        coded = torch.float32 if algorithm == "hierarchical" and dtype != torch.float16 else dtype
        deferred = _without_kernels(kind, comm, legs, config, coded, shape)
    check, title = _title(kind, shape, dtype, site_kind, config)
    made = Plan(
        deferred=deferred,
        kind=kind,
        comm=comm,
        transport=comm.transport(device, config),
        config=config,
        algorithm=algorithm,
        reduce=legs.reduce,
        gather=legs.gather,
        dtype=dtype,
        label=site_kind or kind,
        title=title,
        noted=f"{title}, {f'deferred ({deferred})' if deferred else 'compressed'}",
        check=check,
        seconds=comm.seconds(config),
        minimum=minimum,
        exact_bytes=exact_bytes(kind, exact, comm.world),
    )
    if deferred or kind == "all_to_all":
        return made
    return cut_plan(made, shape, device, 0 if recipe.calibrated else piece_values(made, transport, exact))


def _without_kernels(
    kind: str, comm: Communicator | Simulated, legs: Legs, config: Config, dtype: torch.dtype, shape: Sequence[int]
) -> str | None:
    """Why no CUDA kernel would encode, None if one would: torch's codec takes longer on a GPU than it saves."""
    if legs.reduce.native is None or legs.gather.native is None:
        return NO_KERNELS_FOR.format(f"recipe {config.recipe}")
    width = shape[-1] if shape else 1
    numel = 2 * width if kind == "all_to_all" and shape else math.prod(shape)  # a message has any number of rows
    for leg in (legs.reduce, legs.gather):
        if lacking := leg.without_kernel(dtype, numel, width):
            return NO_KERNELS_FOR.format(lacking)
    return None if comm.gpus.has_kernels else NO_KERNELS


def _minimum(
    kind: str, dtype: torch.dtype, transport: str, comm: Communicator | Simulated, config: Config, legs: Legs | None
) -> int:
    """Bytes of a tensor from which on compression pays."""
    case = Case(kind, name(dtype), width_of(config, legs), config.recipe)
    over_nvlink = transport == "cuda" and not fused.CHAINS[config.transport] and comm.gpus.has_nvlink
    topology = topology_of(comm.world, comm.nodes, transport)
    return minimum_size(case, topology, "nvlink" if over_nvlink else transport, config)


def width_of(config: Config, legs: Legs | None) -> int:
    """The width of a call's codecs: that of sums, of gradients, or of a model's last sum."""
    if legs is None or legs == config.legs:
        return config.bits
    if legs == config.gradient_legs:
        return config.grad_bits
    widths = RECIPES[config.recipe].widths
    return next((bits for bits in widths if legs == config.legs_of(bits)), config.bits)  # none: of a calibrated site


def _title(
    kind: str, shape: Sequence[int], dtype: torch.dtype, site_kind: str | None, config: Config
) -> tuple[int, str]:
    """A checksum of configuration and call, and the call in words, which starts with it."""
    rows = ["*", *shape] if kind == "all_to_all" else list(shape)
    title = " ".join(str(word) for word in (kind, rows, name(dtype), site_kind) if word)
    check = zlib.crc32(f"{agreement.digest(config)} {title}".encode()) & 0xFFFF
    return check, f"{check:04x} {title}"[:TITLE]


def message_codec(x: Tensor, plan: Plan) -> Codec:
    """The codec of one message of an all-to-all, which both its ends know: exact where it is small.

    The messages of a call differ in size, so that no size is known to all ranks; each pair decides for itself.
    """
    return plan.gather if x.numel() and x.nbytes >= plan.minimum else Raw(x.dtype)


def exact_bytes(kind: str, nbytes: int, world: int) -> int:
    """Bytes one rank sends in the uncompressed ring collective over an input of ``nbytes`` bytes."""
    sends = {"all_reduce": 2 * (world - 1) / world, "all_gather": world - 1}
    return int(nbytes * sends.get(kind, (world - 1) / world))


def _reason(kind: str, nbytes: int, dtype: torch.dtype, world: int, minimum: int, by_row: bool) -> str | None:
    """Why a tensor of ``nbytes`` is left to the original collective, None if it is not."""
    if world == 1:
        return "one rank"
    if dtype not in DTYPES:
        return f"dtype {name(dtype)}"
    if kind == "all_to_all":  # no size is known to all ranks
        return None
    if nbytes == 0:
        return "empty"
    small = "below the minimum size, by row" if by_row else f"below {minimum} bytes"
    return small if nbytes < minimum else None


def name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _algorithm(
    comm: Communicator | Simulated, transport: str, nbytes: int, config: Config, by_row: bool = False
) -> str:
    """Of an all-reduce. Hierarchical where several machines hold equally many ranks, more than one.

    ``by_row``: how many rows there are must not decide, as it does over two sockets.
    """
    asked = config.algorithm if config.algorithm != "auto" else RECIPES[config.recipe].algorithm
    fits = _is_even(comm.nodes)
    if asked == "hierarchical" or (asked == "auto" and fits):
        return "hierarchical" if fits else flat(comm.world)
    if asked != "auto":
        return asked
    over_group = transport == "cuda" and not fused.CHAINS[config.transport]
    if by_row or not over_group or nbytes < SOCKETS_BYTES:
        return flat(comm.world)
    return "sockets" if len(set(comm.gpus.sockets)) == 2 and _is_even(comm.gpus.sockets) else flat(comm.world)


def _is_even(nodes: Sequence[int]) -> bool:
    """Whether several machines, or sockets, hold equally many ranks, more than one, and come in the same order in every
    slice, lest a row's sum depend on the slice it is in."""
    machines = [[rank for rank, each in enumerate(nodes) if each == node] for node in dict.fromkeys(nodes)]
    sizes = {len(ranks) for ranks in machines}
    in_order = all(list(ranks) == sorted(ranks) for ranks in zip(*machines, strict=False))
    return len(machines) > 1 and len(sizes) == 1 and sizes != {1} and in_order


def flat(world: int) -> str:
    return "one-step" if world <= ONE_STEP_WORLD else "two-step"


# ---- cuts -------------------------------------------------------------------------------------------------------


def cut(numel: int, width: int, world: int, unit: int) -> Slices:
    """``numel`` values, rows of ``width``, as slices for ``world`` ranks; one row is cut at multiples of ``unit``."""
    alignment = width if numel > width else unit
    length = math.ceil(math.ceil(numel / alignment) / world) * alignment
    return Slices(numel, width, min(length, numel), world)


def cut_plan(plan: Plan, shape: Sequence[int], device: torch.device, piece: int) -> Plan:
    """``plan`` with its pieces and bytes."""
    comm, numel = plan.comm, math.prod(shape)
    width = shape[-1] if len(shape) > 1 else numel
    unit = math.lcm(plan.reduce.unit, plan.gather.unit)
    if plan.algorithm in ("hierarchical", "sockets"):
        from .hierarchical import cut_machines, cut_sockets

        cut_stages = cut_machines if plan.algorithm == "hierarchical" else cut_sockets
        return cut_stages(plan, numel, width, unit, device)
    if plan.kind == "reduce_scatter":
        slices = [(0, Slices(numel, min(width, numel // comm.world), numel // comm.world, comm.world))]
    elif plan.kind == "all_gather":
        slices = [(0, Slices(numel * comm.world, width, numel, comm.world))]
    else:
        step, alignment = piece * (comm.world if plan.algorithm == "two-step" else 1), width if numel > width else unit
        step = math.ceil(step / alignment) * alignment if step else numel
        parts, slices = comm.world if plan.algorithm == "two-step" else 1, []
        for first in range(0, numel, step):
            slices.append((first, cut(min(step, numel - first), width, parts, unit)))
    pieces = tuple(_piece(plan, first, each) for first, each in slices)
    sent = sum(_sent(plan, piece) for piece in pieces)
    far = sum(node != comm.nodes[comm.rank] for node in comm.nodes)
    return plan._replace(pieces=pieces, wire_bytes=sent, remote_bytes=sent * far // max(comm.world - 1, 1))


def piece_values(plan: Plan, transport: str, nbytes: int) -> int:
    """Values of a piece whose messages go to one peer, of a tensor of ``nbytes``; 0: it is one piece."""
    if transport != "cuda":
        return PIECE.get(transport, 0)
    slices = plan.comm.world if plan.algorithm == "two-step" else 1
    pieces = 1 if fused.CHAINS[plan.config.transport] else gpu_pieces(nbytes)  # one kernel overlaps by itself
    return math.ceil(nbytes // plan.dtype.itemsize / (pieces * slices)) if pieces > 1 else 0


def gpu_pieces(nbytes: int) -> int:
    """How many pieces of a tensor of ``nbytes`` pay on GPUs over a process group."""
    return max(math.isqrt(nbytes // GPU_UNIT), 1)


def _piece(plan: Plan, first: int, slices: Slices) -> Piece:
    rank, world = plan.comm.rank, plan.comm.world
    width = slices.width
    if plan.kind == "all_gather":  # nothing is reduced
        sizes = (0,) * world
    elif slices.world == 1:  # one-step: every rank holds all of it
        sizes = (plan.reduce.wire_bytes(slices.numel, width),) * world
    else:
        sizes = tuple(plan.reduce.wire_bytes(each, width) for each in slices.sizes)
    start, length = min(rank * slices.length, slices.numel), slices.size(rank)
    gather, incoming = plan.gather.wire_bytes(slices.length, width), (sizes[rank],) * world
    lengths = _lengths(plan, sizes, sizes[0] if plan.algorithm == "one-step" else gather)
    return Piece(first, first + slices.numel, slices, sizes, incoming, start, start + length, gather, lengths)


def _lengths(plan: Plan, sizes: Sequence[int], gather: int) -> Lengths:
    """Bytes of the boxes of a piece, of which ranks send ``sizes`` on the reduce leg, if there is one."""
    rank, world = plan.comm.rank, plan.comm.world
    exchanged = (0, 0) if plan.algorithm in ("one-step", "all_gather") else (sum(sizes), world * sizes[rank])
    gather *= plan.algorithm != "reduce_scatter"
    return Lengths(*exchanged, world * gather, gather, rank * gather)


def _sent(plan: Plan, piece: Piece) -> int:
    """Bytes that this rank sends."""
    peers, reduce = plan.comm.world - 1, sum(piece.sizes) - piece.sizes[plan.comm.rank]
    gather = peers * piece.gather_size
    return {"two-step": reduce + gather, "all_gather": gather}.get(plan.algorithm, reduce)
