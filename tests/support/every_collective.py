"""Every public collective on one rank, compared with its definition by the torch reference of the codecs.

``every_collective`` is for ``spawn``: shapes and dtypes of all kinds, for each configuration that it is given.
"""

from __future__ import annotations

import math

import torch
from specification import planned

from flashcomm_megatron.collectives import all_gather, all_reduce, reduce_scatter
from flashcomm_megatron.config import Config

SHAPES = [(1,), (7,), (129,), (3, 43), (2, 5, 96), (1000,), (20, 192)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """What rank ``rank`` contributes: the same tensor wherever it is computed."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def width_of(x: torch.Tensor) -> int:
    """Values of a row; a tensor of one dimension is one row."""
    return x.size(-1) if x.dim() > 1 else x.numel()


def through(codec, x: torch.Tensor, dtype: torch.dtype = torch.float32, width: int | None = None) -> torch.Tensor:
    """decode(encode(x)) by the torch reference, in rows of ``width`` or as ``x`` has them."""
    flat, width = x.reshape(-1), width or width_of(x)
    return codec.decode_sum_ref([codec.encode_ref(flat, width)], flat.numel(), dtype, width).view(x.shape)


def expected_sum(codec, parts: list[torch.Tensor], width: int | None = None) -> torch.Tensor:
    """The specification of one reduction: sum in rank order, float32, of the decoded parts."""
    total = through(codec, parts[0], width=width)
    for x in parts[1:]:
        total = total + through(codec, x, width=width)
    return total.to(parts[0].dtype)


def expected_all_reduce(config: Config, parts: list[torch.Tensor]) -> torch.Tensor:
    world, plan, x = len(parts), planned("all_reduce", parts[0], len(parts), config), parts[0]
    if plan.algorithm == "one-step":
        return expected_sum(plan.reduce, parts)
    has_rows = x.dim() > 1 and x.numel() > x.size(-1)  # else cut where both codecs' units end
    grain = x.size(-1) if has_rows else math.lcm(plan.reduce.unit, plan.gather.unit)
    length = math.ceil(math.ceil(x.numel() / grain) / world) * grain
    slices = zip(*(x.reshape(-1).split(length) for x in parts), strict=True)
    sums = [expected_sum(plan.reduce, list(pieces), width_of(x)) for pieces in slices]
    return torch.cat([through(plan.gather, piece, piece.dtype, width_of(x)) for piece in sums]).view(x.shape)


def every_collective(rank: int, world: int, configs: list[Config]) -> int:
    """Compare each collective with its specification; number of comparisons made.

    Every configuration meets every shape and every dtype, every shape every dtype; over three worlds all three meet.
    """
    for number, config in enumerate(configs):
        for place, shape in enumerate(SHAPES):
            dtype = DTYPES[(number + place + world) % len(DTYPES)]
            parts = [part(r, shape, dtype) for r in range(world)]
            x, wanted = parts[rank].clone(), expected_all_reduce(config, parts)
            assert torch.equal(all_reduce(x, None, config), wanted)
            assert torch.equal(x, wanted), "a contiguous input is reduced in place"

            plan = planned("all_reduce", x, world, config)
            gathered = torch.cat([through(plan.gather, each, dtype) for each in parts])
            assert torch.equal(all_gather(parts[rank], None, config), gathered)

            wide = [part(r, (world * 2, *shape), dtype) for r in range(world)]
            mine = expected_sum(plan.reduce, [each.chunk(world)[rank] for each in wide])
            assert torch.equal(reduce_scatter(wide[rank], None, config), mine)
    return len(configs) * len(SHAPES) * 3
