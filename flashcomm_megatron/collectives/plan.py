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

from ..codec import Codec, Raw
from ..codec.recipes import RECIPES, Legs
from ..comm.wire import STREAMED, Wire
from ..config import Config
from . import thresholds
from .thresholds import Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Values of a message in pieces (pieces.py): a fraction of a millisecond at 1 Gbit/s; through shared memory only what
# exceeds the cache is cut.
PIECE = {"shared memory": 2048 * 1024, "connections": 256 * 1024, "cpu": 128 * 1024}
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
    collective: str, x: Tensor, world: int, config: Config, legs: Legs | None = None, wire: Wire | None = None
) -> Plan:
    """The plan for ``collective`` ("all_reduce", "reduce_scatter", "all_gather") over ``x`` on ``world`` ranks.

    ``legs`` are the site's own codecs where the recipe is calibrated; elsewhere the configuration's serve. ``wire``:
    how the ranks are joined (links.py); None: as on one machine.
    """
    return _plan(collective, x.numel(), x.dtype, world, config, legs, wire or _one_machine(x, world, config))


@lru_cache(maxsize=4096)
def _plan(
    collective: str,
    numel: int,
    dtype: torch.dtype,
    world: int,
    config: Config,
    legs: Legs | None,
    wire: Wire,
) -> Plan:
    nbytes = numel * dtype.itemsize
    uncalibrated = RECIPES[config.recipe].calibrated and legs is None and collective != "all_gather"
    is_gradient = legs is not None and legs != config.legs and legs == config.gradient_legs
    case = Case(collective, _name(dtype), config.grad_bits if is_gradient else config.bits, config.recipe)
    legs = legs or config.legs
    algorithm = _algorithm(collective, world, config, wire.nodes)
    split = world if collective == "all_reduce" and algorithm != "one-step" else 1  # messages that a piece becomes
    return Plan(
        reason="no calibrated site" if uncalibrated else _reason(case, nbytes, dtype, wire, world, config),
        algorithm=algorithm,
        reduce=legs.reduce,
        gather=legs.gather,
        exact_bytes=exact_bytes(collective, nbytes, world),
        piece=0 if RECIPES[config.recipe].calibrated else split * _piece(wire.kind, legs),
        nodes=wire.nodes,
        dtype=dtype,
    )


def message_codec(x: Tensor, world: int, config: Config, legs: Legs, wire: Wire) -> Codec:
    """The codec of one message of an all-to-all, which both its ends know: exact where it is small.

    The messages of a call differ in size, so that no size is known to all ranks; each pair decides for itself.
    """
    case = Case("all_to_all", _name(x.dtype), config.bits, config.recipe)
    reason = _reason(case, x.nbytes, x.dtype, wire, world, config)
    return legs.gather if reason is None else Raw(x.dtype)


def exact_bytes(collective: str, nbytes: int, world: int) -> int:
    """Bytes one rank sends in the uncompressed ring collective over an input of ``nbytes`` bytes."""
    sends = {"all_reduce": 2 * (world - 1) / world, "reduce_scatter": (world - 1) / world, "all_gather": world - 1}
    return int(nbytes * sends[collective])


def _reason(case: Case, nbytes: int, dtype: torch.dtype, wire: Wire, world: int, config: Config) -> str | None:
    if world == 1:
        return "one rank"
    if dtype not in DTYPES:
        return f"dtype {case.dtype}"
    if nbytes == 0:
        return "empty"
    least = thresholds.least(case, world, wire, config)
    return f"below {least} bytes" if nbytes < least else None


def _one_machine(x: Tensor, world: int, config: Config) -> Wire:
    streamed = x.device.type == "cpu" and config.transport in STREAMED
    return Wire("shared memory" if streamed else x.device.type, (0,) * world)


def _piece(wire: str, legs: Legs) -> int:
    unit = FAMILY * math.lcm(legs.reduce.block, legs.gather.block)
    return PIECE.get(wire, 0) // unit * unit


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _algorithm(collective: str, world: int, config: Config, nodes: tuple[int, ...]) -> str:
    asked = config.algorithm if config.algorithm != "auto" else RECIPES[config.recipe].algorithm
    ranks = Counter(nodes).values()
    if asked == "auto" and len(ranks) > 1 and max(ranks) > 1:
        asked = "hierarchical"
    if collective != "all_reduce":
        return "hierarchical" if asked == "hierarchical" and len(ranks) > 1 else "flat"
    if asked != "auto":
        return asked
    return "one-step" if world <= ONE_STEP_WORLD else "two-step"
