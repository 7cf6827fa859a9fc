"""Speed of every recipe's codecs on one core, against the plain 4-bit codec of the same run.

run as:  python benchmarks/bench_recipes.py

encode, decode: the reduce leg's codec. cost: the time to encode and decode the same tensor once on each leg, over the
same for the plain codec of 4 bits and block 64. Processor seconds of this thread, all codecs in turn, best of several
rounds, so that other work on the machine counts little. Writes CSV and JSON.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, cast

import record
import torch

import flashcomm_megatron as fc
from flashcomm_megatron.codec import Codec, Remembering, Uniform
from flashcomm_megatron.recipes import RECIPES, Legs

VALUES = 2**20
ROUNDS = 25


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(VALUES, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = Legs(Uniform(4, 64), Uniform(4, 64))
    rivals = {"plain, block 64": calls(plain, x)}
    for name, recipe in RECIPES.items():
        if 4 in recipe.widths and not recipe.calibrated:  # a calibrated codec exists only for a site of a real model
            rivals[name] = calls(fc.Config(bits=4, recipe=name).legs, x)
    rivals["auto with feedback"] = calls(fc.Config(bits=4).legs, x, feedback=True)
    seconds = best(rivals)
    rows = [row(name, each, seconds["plain, block 64"]) for name, each in seconds.items()]
    record.save("recipes", rows)
    for each in rows:
        print(each)


def calls(legs: Legs, x: torch.Tensor, feedback: bool = False) -> list[Callable[[], Any]]:
    """Encoding and decoding ``x`` on either leg; that the result is close is asserted first."""
    return [call for codec in legs for call in both_ways(codec, x, feedback)]


def both_ways(codec: Codec, x: torch.Tensor, feedback: bool) -> list[Callable[[], Any]]:
    payload, out = codec.encode(x), torch.empty_like(x)
    codec.decode_sum([payload], out)
    assert (out - x).norm() < 0.2 * x.norm()
    return [encoding(cast(Remembering, codec), x, payload) if feedback else lambda: codec.encode(x, payload),
            lambda: codec.decode_sum([payload], out)]  # fmt: skip


def encoding(codec: Remembering, x: torch.Tensor, payload: torch.Tensor) -> Callable[[], Any]:
    memory = x.new_zeros(codec.memory_numel(x.numel()))
    return lambda: codec.encode(x, payload, memory)


def best(rivals: dict[str, list[Callable[[], Any]]]) -> dict[str, list[float]]:
    """Least seconds of every call, all taking turns."""
    seconds = {name: [math.inf] * len(each) for name, each in rivals.items()}
    for _ in range(ROUNDS):
        for name, each in rivals.items():
            for i, call in enumerate(each):
                started = time.thread_time()
                call()
                seconds[name][i] = min(seconds[name][i], time.thread_time() - started)
    return seconds


def row(name: str, seconds: list[float], plain: list[float]) -> dict[str, Any]:
    encode, decode = (VALUES * 2 / each / 1e9 for each in seconds[:2])
    return {
        "recipe": name,
        "bits": 4,
        "encode_gbs": round(encode, 2),
        "decode_gbs": round(decode, 2),
        "cost": round(sum(seconds) / sum(plain), 2),
    }


if __name__ == "__main__":
    main()
