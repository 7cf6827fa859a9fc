"""What collectives must return, by the torch reference of the codecs alone; and data on which codecs can go wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashcomm_megatron.collectives import algorithms
from flashcomm_megatron.collectives.algorithms import Residuals
from flashcomm_megatron.collectives.plan import Plan
from flashcomm_megatron.comm import simulated as lockstep


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


def through(codec: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """decode(encode(x))"""
    return codec.decode_sum_ref([codec.encode_ref(x)], x.numel(), dtype)


def total(codec: Any, parts: Sequence[Tensor]) -> Tensor:
    """Sum in rank order, float32, of the decoded parts."""
    return codec.decode_sum_ref([codec.encode_ref(x) for x in parts], parts[0].numel(), parts[0].dtype)


def expected(kind: str, codecs: tuple[Any, Any], parts: Sequence[Tensor]) -> list[Tensor]:
    """What every rank holds after the collective ``kind``: algorithms.py in a few lines. Tensors 1-D, on the CPU."""
    reduce, gather = codecs
    world, numel = len(parts), parts[0].numel()
    if kind == "one-step":
        return [total(reduce, parts)] * world
    if kind == "all_gather":
        return [torch.cat([through(gather, x, x.dtype) for x in parts])] * world
    if kind == "reduce_scatter":
        return [total(reduce, [x.chunk(world)[rank] for x in parts]) for rank in range(world)]
    unit = math.lcm(reduce.block, gather.block)
    length = math.ceil(math.ceil(numel / world) / unit) * unit
    slices = zip(*(x.split(length) for x in parts), strict=True)
    return [torch.cat([through(gather, total(reduce, s), s[0].dtype) for s in slices])] * world


def outputs(kind: str, parts: Sequence[Tensor]) -> list[Tensor]:
    """A tensor of NaN for every rank's result."""
    world, numel = len(parts), parts[0].numel()
    size = {"reduce_scatter": numel // world, "all_gather": numel * world}.get(kind, numel)
    return [torch.full((size,), torch.nan, dtype=x.dtype, device=x.device) for x in parts]


def plan_of(kind: str, legs: Sequence[Any], dtype: torch.dtype) -> Plan:
    """A plan of ``kind`` with these codecs, tensors in one piece."""
    reduce, gather = legs
    return Plan(None, kind, reduce, gather, exact_bytes=0, piece=0, nodes=(), dtype=dtype)


def carried(kind: str, legs: Sequence[Any], calls: Sequence[Sequence[Tensor]], world: int) -> list[Any]:
    """Results of consecutive calls with a memory, by the algorithms over any process group; after each all memories."""
    memories, found = [Residuals() for _ in range(world)], []
    plan = plan_of(kind, legs, calls[0][0].dtype)
    for parts in calls:
        x, out = [part.clone() for part in parts], outputs("reduce_scatter", parts)

        def start(link: Any, x: list[Tensor] = x, out: list[Tensor] = out) -> Any:
            memory = memories[link.rank]
            if kind == "reduce_scatter":
                return algorithms.reduce_scatter(x[link.rank], out[link.rank], link, plan, memory)
            algorithm = algorithms.one_step if kind == "one-step" else algorithms.two_step
            return algorithm(x[link.rank], link, plan, memory)

        results = lockstep.run(start, world)
        kept = [memory.parts[0] for memory in memories]
        losses = [[getattr(each, leg) for each in kept] for leg in ("reduce", "gather")]
        found.append((results, [[None if loss is None else loss.clone() for loss in leg] for leg in losses]))
    return found
