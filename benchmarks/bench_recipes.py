"""Speed of every recipe's codecs on one core, against the plain 4-bit codec of the same run.

run as:  python benchmarks/bench_recipes.py

encode, decode: the reduce leg's codec. cost: the time to encode and decode the same tensor once on each leg, over the
same for the plain codec of 4 bits and block 64. Processor seconds of this thread, all codecs in turn, best of several
rounds, so that other work on the machine counts little. Writes CSV and JSON.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import record
import torch

from flashcomm_megatron.codec import Codec, Uniform
from flashcomm_megatron.codec.published.outlier import from_ranges
from flashcomm_megatron.codec.recipes import RECIPES, Legs

VALUES = 2**20
ROUNDS = 25


class Rival(NamedTuple):
    """A row of the table."""

    recipe: str
    bits: int
    feedback: bool = False


PLAIN = Rival("plain, block 64", 4)


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(VALUES, generator=torch.Generator().manual_seed(0)).bfloat16()
    seconds = best({rival: calls(legs_of(rival, x), x, rival.feedback) for rival in rivals()})
    rows = [row(rival, each, seconds[PLAIN]) for rival, each in seconds.items()]
    record.save("recipes", rows)
    for each in rows:
        print(each)


def rivals() -> Iterator[Rival]:
    """Every recipe at 4 bits, or the least it has; auto at every width, with feedback and without."""
    yield PLAIN
    for name, recipe in RECIPES.items():
        yield Rival(name, 4 if 4 in recipe.widths else min(recipe.widths))
    yield from (Rival("auto", bits, True) for bits in RECIPES["auto"].widths)


def legs_of(rival: Rival, x: torch.Tensor) -> Legs:
    """Its codecs; a calibrated one has the ranges of ``x``, taken as tokens of 1024 features."""
    if rival == PLAIN:
        return Legs(Uniform(4, 64), Uniform(4, 64))
    recipe = RECIPES[rival.recipe]
    legs = recipe.legs(rival.bits, recipe.block)
    low, high = x.view(-1, 1024).float().aminmax(dim=0)
    return legs._replace(reduce=from_ranges(low[None], high[None], 0)) if recipe.calibrated else legs


def calls(legs: Legs, x: torch.Tensor, feedback: bool) -> list[Callable[[], Any]]:
    """Encoding and decoding ``x`` on either leg; that the result is close is asserted first."""
    return [call for codec in legs for call in both_ways(codec, x, feedback)]


def both_ways(codec: Codec, x: torch.Tensor, feedback: bool) -> list[Callable[[], Any]]:
    payload, out = codec.encode(x), torch.empty_like(x)
    codec.decode_sum([payload], out)
    assert (out - x).norm() < 0.5 * x.norm()
    encode = encoding(codec, x, payload) if feedback else lambda: codec.encode(x, payload)
    return [encode, lambda: codec.decode_sum([payload], out)]


def encoding(codec: Codec, x: torch.Tensor, payload: torch.Tensor) -> Callable[[], Any]:
    memory = x.new_zeros(codec.residual_numel(x.numel()))
    return lambda: codec.encode(x, payload, memory)


def best(rivals: dict[Rival, list[Callable[[], Any]]]) -> dict[Rival, list[float]]:
    """Least seconds of every call, all taking turns."""
    seconds = {name: [math.inf] * len(each) for name, each in rivals.items()}
    for _ in range(ROUNDS):
        for name, each in rivals.items():
            for i, call in enumerate(each):
                started = time.thread_time()
                call()
                seconds[name][i] = min(seconds[name][i], time.thread_time() - started)
    return seconds


def row(rival: Rival, seconds: list[float], plain: list[float]) -> dict[str, Any]:
    encode, decode = (VALUES * 2 / each / 1e9 for each in seconds[:2])
    return {
        **rival._asdict(),
        "encode_gbs": round(encode, 2),
        "decode_gbs": round(decode, 2),
        "cost": round(sum(seconds) / sum(plain), 2),
    }


if __name__ == "__main__":
    main()
