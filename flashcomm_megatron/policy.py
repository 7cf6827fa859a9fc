"""When to quantize: one predicate, and the plan of a call that passes it.

Every rank must take the same branch or the job hangs, so a plan is a pure function of the collective, the number of
values, the dtype, the kind of device, the world size and the configuration: never of data, addresses or anything
that failed locally. Plans are cached; a call that defers costs one lookup.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .codec import Codec
from .config import Config
from .recipes import RECIPES, Legs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Below these many bytes of the tensor the original collective is faster. cpu: benchmarks/bench_collectives.py over
# loopback gloo. cuda: not measured by us; the smallest size at which published kernels of this kind win on fp16 (AMD
# QuickReduce's table, 1 to 16 MiB by world size).
MIN_BYTES = {"cpu": 16 * 1024, "cuda": 1024 * 1024}

# One-step moves world / 2 times the bytes of two-step, but in one exchange instead of two.
ONE_STEP_WORLD = 2


class Plan(NamedTuple):
    """What one call will do. ``reason`` is None, or why the call is left to the original collective."""

    reason: str | None
    algorithm: str
    reduce: Codec
    gather: Codec
    exact_bytes: int  # sent by this rank if uncompressed


def plan(collective: str, x: Tensor, world: int, config: Config, legs: Legs | None = None) -> Plan:
    """The plan for ``collective`` ("all_reduce", "reduce_scatter", "all_gather") over ``x`` on ``world`` ranks.

    ``legs`` are the site's own codecs where the recipe is calibrated; elsewhere the configuration's serve.
    """
    return _plan(collective, x.numel(), x.dtype, x.device.type, world, config, legs)


@lru_cache(maxsize=4096)
def _plan(
    collective: str, numel: int, dtype: torch.dtype, device: str, world: int, config: Config, legs: Legs | None
) -> Plan:
    nbytes = numel * dtype.itemsize
    uncalibrated = RECIPES[config.recipe].calibrated and legs is None and collective != "all_gather"
    legs = legs or config.legs
    return Plan(
        reason="no calibrated site" if uncalibrated else _reason(nbytes, dtype, device, world, config),
        algorithm=_algorithm(world, config),
        reduce=legs.reduce,
        gather=legs.gather,
        exact_bytes=exact_bytes(collective, nbytes, world),
    )


def exact_bytes(collective: str, nbytes: int, world: int) -> int:
    """Bytes one rank sends in the uncompressed ring collective over an input of ``nbytes`` bytes."""
    sends = {"all_reduce": 2 * (world - 1) / world, "reduce_scatter": (world - 1) / world, "all_gather": world - 1}
    return int(nbytes * sends[collective])


def _reason(nbytes: int, dtype: torch.dtype, device: str, world: int, config: Config) -> str | None:
    least = MIN_BYTES.get(device, MIN_BYTES["cuda"]) if config.min_bytes is None else config.min_bytes
    if world == 1:
        return "one rank"
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')}"
    if nbytes == 0:
        return "empty"
    if nbytes < least:
        return f"below {least} bytes"
    return None


def _algorithm(world: int, config: Config) -> str:
    asked = config.algorithm if config.algorithm != "auto" else RECIPES[config.recipe].algorithm
    if asked != "auto":
        return asked
    return "one-step" if world <= ONE_STEP_WORLD else "two-step"
