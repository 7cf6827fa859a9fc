"""What collectives must return, by the torch reference of the codecs alone; and data on which codecs can go wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashcomm_megatron.codec.recipes import Legs
from flashcomm_megatron.collectives import ALGORITHMS
from flashcomm_megatron.collectives.algorithms import Residuals
from flashcomm_megatron.collectives.plan import Plan, plan
from flashcomm_megatron.comm import simulated
from flashcomm_megatron.comm.communicator import Call
from flashcomm_megatron.comm.simulated import Simulated
from flashcomm_megatron.config import Config

CALL = Call(1, "simulated", 0, 0.0)
LAUNCHES = 60e-6  # seconds of a piece's three kernels and two of NCCL's, with the host's share: for the planner's cost


def strange(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values, with blocks that are constant, zero, NaN, Inf, tiny, huge or of both zeros."""
    x = torch.randn(max(numel, 512), generator=torch.Generator().manual_seed(seed))
    for i, value in enumerate([0.0, 1 / 3, math.nan, math.inf, 1e-38, 3e38, -0.0]):
        start = (i * 2 + 1) * 32
        x[start : start + 32] = value
        if i % 2:
            x[start + 3 : start + 5] *= -1
    return x[:numel].to(dtype)


def fading(numel: int) -> list[Tensor]:
    """float16 tensors of which a memory keeps zeros of both signs: the smallest numbers, then nothing but -0."""
    smallest = torch.randint(-40, 41, (numel,), generator=torch.Generator().manual_seed(numel)) * 2.0**-24
    return [smallest.half(), *[torch.full((numel,), -0.0, dtype=torch.float16)] * 3]


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bit patterns, but for the sign and payload of NaN, in which torch's own conversions differ."""
    bits = [torch.where(x.isnan(), torch.nan, x.float()).view(torch.int32) for x in (found.cpu(), expected.cpu())]
    return torch.equal(*bits)


def through(codec: Any, x: Tensor, dtype: torch.dtype, width: int | None = None) -> Tensor:
    """decode(encode(x)) of rows of ``width``."""
    return codec.decode_sum_ref([codec.encode_ref(x, width)], x.numel(), dtype, width)


def total(codec: Any, parts: Sequence[Tensor], width: int | None = None) -> Tensor:
    """Sum in rank order, float32, of the decoded parts."""
    return codec.decode_sum_ref([codec.encode_ref(x, width) for x in parts], parts[0].numel(), parts[0].dtype, width)


def expected(kind: str, codecs: tuple[Any, Any], parts: Sequence[Tensor]) -> list[Tensor]:
    """What every rank holds after the collective ``kind``, flat: algorithms.py in a few lines. On the CPU."""
    reduce, gather = codecs
    world, numel, width = len(parts), parts[0].numel(), parts[0].size(-1) if parts[0].dim() > 1 else parts[0].numel()
    parts = [part.reshape(-1) for part in parts]
    if kind == "one-step":
        return [total(reduce, parts, width)] * world
    if kind == "all_gather":
        return [torch.cat([through(gather, x, x.dtype, width) for x in parts])] * world
    if kind == "reduce_scatter":
        width = min(width, numel // world)
        return [total(reduce, [x.chunk(world)[rank] for x in parts], width) for rank in range(world)]
    grain = width if numel > width else math.lcm(reduce.unit, gather.unit)
    length = math.ceil(math.ceil(numel / grain) / world) * grain
    slices = zip(*(x.split(length) for x in parts), strict=True)
    return [torch.cat([through(gather, total(reduce, s, width), s[0].dtype, width) for s in slices])] * world


def cut(kind: str, codecs: Sequence[Any], numel: int, world: int) -> tuple[list[Any], int]:
    """The codecs and the values of a slice with which a kernel does this over tensors of one row, as plans say."""
    if kind != "two-step":
        length = numel if kind == "one-step" else numel // world
        return [codec.fitted(max(length, 1)) for codec in codecs], length
    unit = math.lcm(*(codec.unit for codec in codecs))
    return [codec.fitted(max(numel, 1)) for codec in codecs], math.ceil(math.ceil(numel / unit) / world) * unit


class Uncompressed:
    """Stands for the 16-bit path of the same kernels."""

    native = 0, 16, 8
    bits, block, unit = 16, 8, 8

    def fitted(self, width: int) -> Uncompressed:
        """Itself."""
        return self


def outputs(kind: str, parts: Sequence[Tensor]) -> list[Tensor]:
    """A tensor of NaN for every rank's result."""
    world, numel = len(parts), parts[0].numel()
    size = {"reduce_scatter": numel // world, "all_gather": numel * world}.get(kind, numel)
    return [torch.full((size,), torch.nan, dtype=x.dtype, device=x.device) for x in parts]


def planned(
    kind: str,
    x: Tensor,
    world: int,
    config: Config,
    rank: int = 0,
    nodes: Sequence[int] = (),
    over: str | None = None,
    legs: Legs | None = None,
) -> Plan:
    """The plan of one rank of ``world``, simulated ones."""
    return plan(kind, x.shape, x.dtype, x.device, Simulated(rank, world, nodes, over), config, legs=legs)


def on(made: Plan, comm: Simulated) -> Plan:
    """A plan of equal slices for another rank."""
    return made._replace(comm=comm, transport=comm)


def plan_of(kind: str, legs: Sequence[Any], dtype: torch.dtype, numel: int, world: int, rank: int = 0) -> Plan:
    """A plan of ``kind`` with these codecs, tensors of ``numel`` values in one piece."""
    is_half = kind in ("reduce_scatter", "all_gather")
    config = Config(bits=4, min_bytes=0, algorithm="auto" if is_half else kind)
    x = torch.empty(1, dtype=dtype).expand(numel)
    return planned(kind if is_half else "all_reduce", x, world, config, rank, over="cuda", legs=Legs(*legs))


def simulate(
    plans: Sequence[Plan], inputs: Sequence[Tensor], outs: Sequence[Tensor], residuals: Any = None
) -> list[Tensor]:
    """Results by rank of a planned collective."""

    def start(comm: Simulated) -> Any:
        made, rank = on(plans[comm.rank], comm), comm.rank
        return ALGORITHMS[made.algorithm](inputs[rank], outs[rank], made, CALL, residuals and residuals[rank])

    return simulated.run(start, len(plans))


def carried(kind: str, legs: Sequence[Any], calls: Sequence[Sequence[Tensor]], world: int) -> list[Any]:
    """Results of consecutive calls with residuals, by the algorithms over any process group; after each all of them."""
    residuals, found = [Residuals() for _ in range(world)], []
    for parts in calls:
        x, out = [part.clone() for part in parts], outputs("reduce_scatter", parts)
        plans = [plan_of(kind, legs, x[0].dtype, x[0].numel(), world, rank) for rank in range(world)]
        results = simulate(plans, x, out if kind == "reduce_scatter" else x, residuals)
        losses = [[each.kept.get((0, leg)) for each in residuals] for leg in ("reduce", "gather")]
        found.append((results, [[None if loss is None else loss.clone() for loss in leg] for leg in losses]))
    return found
