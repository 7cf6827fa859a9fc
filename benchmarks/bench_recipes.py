"""Speed of every recipe's reduce codec on one core, against the plain 4-bit codec of the same run.

run as:  python benchmarks/bench_recipes.py

Processor seconds of this thread, best of several, so that other work on the machine counts little. Writes CSV and JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import record
import torch

import flashcomm_megatron as fc
from flashcomm_megatron.codec import Codec, Uniform, residual
from flashcomm_megatron.recipes import RECIPES

VALUES = 2**20
REPEATS = 7


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(VALUES, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = cost(Uniform(4, 64), x)
    rows = [row("plain, block 64", 4, plain, plain)]
    for name, recipe in RECIPES.items():
        if 4 in recipe.widths and not recipe.calibrated:  # a calibrated codec exists only for a site of a real model
            codec = fc.Config(bits=4, recipe=name).legs.reduce
            rows.append(row(name, 4, cost(codec, x), plain))
    auto = fc.Config(bits=4).legs.reduce
    rows.append(row("auto with feedback", 4, cost(auto, x, torch.zeros_like(x)), plain))
    record.save("recipes", rows)
    for each in rows:
        print(each)


def cost(codec: Codec, x: torch.Tensor, lost: torch.Tensor | None = None) -> tuple[float, float]:
    """Seconds to encode ``x``, and to decode it; that the result is close is asserted first."""
    payload, out = codec.encode(x), torch.empty_like(x)
    codec.decode_sum([payload], out)
    assert (out - x).norm() < 0.2 * x.norm()
    encode = (lambda: codec.encode(x, payload)) if lost is None else lambda: residual.encode(codec, x, lost, payload)
    return best(encode), best(lambda: codec.decode_sum([payload], out))


def best(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(REPEATS):
        started = time.thread_time()
        call()
        seconds.append(time.thread_time() - started)
    return min(seconds)


def row(name: str, bits: int, seconds: tuple[float, float], plain: tuple[float, float]) -> dict[str, Any]:
    encode, decode = (VALUES * 2 / each / 1e9 for each in seconds)
    return {
        "recipe": name,
        "bits": bits,
        "encode_gbs": round(encode, 2),
        "decode_gbs": round(decode, 2),
        "cost": round(sum(seconds) / sum(plain), 2),
    }


if __name__ == "__main__":
    main()
