"""When to quantize: one predicate, and the plan of a call that passes it.

Every rank must take the same branch or the job hangs, so a plan is a pure function of the collective, the number of
values, the dtype, the kind of device, the world size and the configuration: never of data, addresses or anything
that failed locally. Plans are cached; a call that defers costs one lookup.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import thresholds
from .codec import Codec, Raw
from .config import Config
from .recipes import RECIPES, Legs
from .thresholds import Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Values of a piece (pieces.py): on a CPU the payload of one stays in the cache and takes milliseconds on a slow link.
PIECE = {"cpu": 512 * 1024}
FAMILY = 32  # a piece is a multiple of so many blocks, so that cutting changes no bit: codec/rotated.py

# One-step moves world / 2 times the bytes of two-step, but in one exchange instead of two.
ONE_STEP_WORLD = 2


class Plan(NamedTuple):
    """What one call will do. ``reason`` is None, or why the call is left to the original collective."""

    reason: str | None
    algorithm: str
    reduce: Codec
    gather: Codec
    exact_bytes: int  # sent by this rank if uncompressed
    piece: int  # values that are encoded and sent at a time; 0: all
    nodes: tuple[int, ...]  # the machine of each rank where that matters
    dtype: torch.dtype


def plan(
    collective: str, x: Tensor, world: int, config: Config, legs: Legs | None = None, nodes: tuple[int, ...] = ()
) -> Plan:
    """The plan for ``collective`` ("all_reduce", "reduce_scatter", "all_gather") over ``x`` on ``world`` ranks.

    ``legs`` are the site's own codecs where the recipe is calibrated; elsewhere the configuration's serve. ``nodes``:
    the machine that each rank runs on; empty: one machine.
    """
    return _plan(collective, x.numel(), x.dtype, x.device.type, world, config, legs, nodes)


@lru_cache(maxsize=4096)
def _plan(
    collective: str,
    numel: int,
    dtype: torch.dtype,
    device: str,
    world: int,
    config: Config,
    legs: Legs | None,
    nodes: tuple[int, ...],
) -> Plan:
    nbytes = numel * dtype.itemsize
    uncalibrated = RECIPES[config.recipe].calibrated and legs is None and collective != "all_gather"
    legs = legs or config.legs
    return Plan(
        reason="no calibrated site"
        if uncalibrated
        else _reason(collective, nbytes, dtype, device, world, config, nodes),
        algorithm=_algorithm(world, config, nodes),
        reduce=legs.reduce,
        gather=legs.gather,
        exact_bytes=exact_bytes(collective, nbytes, world),
        piece=0 if RECIPES[config.recipe].calibrated else _piece(device, legs),
        nodes=nodes,
        dtype=dtype,
    )


def message_codec(x: Tensor, world: int, config: Config, legs: Legs, nodes: tuple[int, ...]) -> Codec:
    """The codec of one message of an all-to-all, which both its ends know: exact where it is small.

    The messages of a call differ in size, so that no size is known to all ranks; each pair decides for itself.
    """
    reason = _reason("all_to_all", x.nbytes, x.dtype, x.device.type, world, config, nodes)
    return legs.gather if reason is None else Raw(x.dtype)


def exact_bytes(collective: str, nbytes: int, world: int) -> int:
    """Bytes one rank sends in the uncompressed ring collective over an input of ``nbytes`` bytes."""
    sends = {"all_reduce": 2 * (world - 1) / world, "reduce_scatter": (world - 1) / world, "all_gather": world - 1}
    return int(nbytes * sends[collective])


def _reason(
    collective: str, nbytes: int, dtype: torch.dtype, device: str, world: int, config: Config, nodes: tuple[int, ...]
) -> str | None:
    name = str(dtype).removeprefix("torch.")
    if world == 1:
        return "one rank"
    if dtype not in DTYPES:
        return f"dtype {name}"
    if nbytes == 0:
        return "empty"
    place = "shared memory" if device == "cpu" and _share_memory(config, nodes) else device
    least = thresholds.least(Case(collective, name, config.bits, config.recipe), world, place, config)
    return f"below {least} bytes" if nbytes < least else None


def _share_memory(config: Config, nodes: tuple[int, ...]) -> bool:
    return config.transport in ("auto", "host") and len(set(nodes)) == 1


def _piece(device: str, legs: Legs) -> int:
    unit = FAMILY * math.lcm(legs.reduce.block, legs.gather.block)
    return PIECE.get(device, 0) // unit * unit


def _algorithm(world: int, config: Config, nodes: tuple[int, ...]) -> str:
    asked = config.algorithm if config.algorithm != "auto" else RECIPES[config.recipe].algorithm
    if asked != "auto":
        return asked
    ranks = Counter(nodes).values()
    if len(ranks) > 1 and max(ranks) > 1:
        return "hierarchical"
    return "one-step" if world <= ONE_STEP_WORLD else "two-step"
