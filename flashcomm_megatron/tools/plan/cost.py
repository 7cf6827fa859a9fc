"""The time of one collective: latency, bytes over the link's rate, codec work over the codec's speed.

On a GPU nothing overlaps. On a CPU large tensors are cut into pieces that are under way together: of sending and codec
the longer one counts, and one piece of the other. Bytes are those of the real number formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ...codec.recipes import RECIPES
from ...collectives.minimum_size import DEFAULTS
from ...collectives.plan import PIECE
from ...config import Config
from .hardware import MEMORY_EFFICIENCY, Gpu, Link

BYTES = 2  # of a bf16 value
SAMPLE = 1 << 20  # values by which a format's bits a value are found


class Collective(NamedTuple):
    """``times`` equal collectives over ``numel`` bf16 values on every rank; of an all_gather, before it."""

    kind: str  # "all_reduce", "reduce_scatter" or "all_gather"
    numel: int
    world: int
    times: int = 1

    @property
    def nbytes(self) -> int:
        return self.numel * BYTES


@dataclass(frozen=True)
class Speed:
    """Bytes per second that a codec encodes and decodes: of values where arithmetic limits it (``by_values``, CPUs),
    else of all it reads and writes (GPUs)."""

    encode: float
    decode: float
    by_values: bool = False


@dataclass(frozen=True)
class Compression:
    """A configuration, the speed of its codecs, and the two numbers that differ between GPUs and CPUs."""

    config: Config
    speed: Speed
    min_bytes: int = DEFAULTS["cuda"]  # of a compressed tensor, where the user sets none
    piece: int = 0  # values of an all-reduce that are sent to each rank together; 0: all

    def deferred(self, collective: Collective) -> str:
        """Why the collective stays exact; empty if it is compressed."""
        least = self.min_bytes if self.config.min_bytes is None else self.config.min_bytes
        return f"below {least} bytes" if collective.nbytes < least else ""

    def one_step(self, collective: Collective) -> bool:
        """Whether an all-reduce gathers partial sums instead of going in two steps."""
        asked, usual = self.config.algorithm, RECIPES[self.config.recipe].algorithm
        automatic = "one-step" if collective.world <= 2 else "two-step"
        algorithm = next((name for name in (asked, usual) if name != "auto"), automatic)
        return collective.kind == "all_reduce" and algorithm == "one-step"

    def pieces(self, collective: Collective) -> int:
        """How many pieces are under way together."""
        if not self.piece or collective.kind != "all_reduce":
            return 1
        slices = 1 if self.one_step(collective) else collective.world
        return max(math.ceil(collective.numel / (self.piece * slices)), 1)


def on_gpu(config: Config, gpu: Gpu, has_nvlink: bool = False) -> Compression:
    """Codecs in fused kernels, limited by the GPU's memory: the assumption where none was measured."""
    rate = gpu.memory_rate * MEMORY_EFFICIENCY
    return Compression(config, Speed(rate, rate), DEFAULTS["nvlink" if has_nvlink else "cuda"])


def on_cpu(config: Config, encode: float, decode: float) -> Compression:
    return Compression(config, Speed(encode, decode, by_values=True), DEFAULTS["cpu"], PIECE["cpu"])


# ---- time ----------------------------------------------------------------------------------------------------------


def seconds(link: Link, collective: Collective, compression: Compression | None) -> float:
    """Of all ``collective.times``; ``compression`` None: exact."""
    if compression is None or compression.deferred(collective):
        return collective.times * _exact(link, collective)
    two_step = collective.kind == "all_reduce" and not compression.one_step(collective)
    exchanges = 2 if two_step else 1
    waits = link.latency + link.codec_latency + exchanges * (link.step + (collective.world - 1) * link.message)
    sent = sent_bytes(collective, compression)
    wire, coding = sent / link.send_rate(collective.world), codec_seconds(collective, compression)
    drained = sent / link.drain if link.drain else 0.0
    overlapped = max(wire, coding) + min(wire, coding) / compression.pieces(collective)
    return collective.times * (waits + drained + overlapped)


def _exact(link: Link, collective: Collective) -> float:
    """The better of a ring and, where there is one, the switch that adds."""
    steps = (collective.world - 1) * (2 if collective.kind == "all_reduce" else 1)
    wire = exact_bytes(collective) / link.send_rate(collective.world)
    ring = link.latency + steps * (link.step + link.message) + wire
    if link.multicast is None or collective.kind != "all_reduce":
        return ring
    return min(ring, link.latency + collective.nbytes / link.multicast)


# ---- bytes and codec work ------------------------------------------------------------------------------------------


def exact_bytes(collective: Collective) -> int:
    """Bytes that one rank sends in a ring."""
    kind, numel, world, _ = collective
    parts = {"all_reduce": 2 * (world - 1) / world, "reduce_scatter": (world - 1) / world, "all_gather": world - 1}
    return int(BYTES * numel * parts[kind])


def sent_bytes(collective: Collective, compression: Compression | None) -> float:
    """Bytes that one rank sends; ``compression`` None, or deferred: exact."""
    if compression is None or compression.deferred(collective):
        return exact_bytes(collective)
    kind, numel, world, _ = collective
    reduce, gather = value_bytes(compression.config)
    if kind == "all_gather":
        return (world - 1) * numel * gather
    if compression.one_step(collective):
        return (world - 1) * numel * reduce
    return (world - 1) / world * numel * (reduce + (gather if kind == "all_reduce" else 0.0))


@lru_cache
def value_bytes(config: Config) -> tuple[float, float]:
    """Bytes a value of the reduce leg and of the gather leg, metadata included."""
    return config.legs.reduce.wire_bytes(SAMPLE) / SAMPLE, config.legs.gather.wire_bytes(SAMPLE) / SAMPLE


def codec_seconds(collective: Collective, compression: Compression) -> float:
    """What one rank encodes and decodes, over the codec's speed."""
    kind, _, world, _ = collective
    values: float = collective.nbytes
    reduce, gather = (each / BYTES for each in value_bytes(compression.config))  # of a value's own bytes
    # Each leg: values encoded, values decoded, values written after decoding; and the payload's share of a value.
    if kind == "all_gather":
        legs = [(values, world * values, world * values, gather)]
    elif compression.one_step(collective):
        legs = [(values, world * values, values, reduce)]
    else:
        legs = [(values, values, values / world, reduce)]
        if kind == "all_reduce":
            legs.append((values / world, values, values, gather))
    encoded, decoded = sum(leg[0] for leg in legs), sum(leg[1] for leg in legs)
    if compression.speed.by_values:
        return encoded / compression.speed.encode + decoded / compression.speed.decode
    residuals = 2 if RECIPES[compression.config.recipe].feedback else 0  # read and written with every value encoded
    read = sum((1 + share) * leg[0] for *leg, share in legs) + residuals * encoded
    written = sum(share * leg[1] + leg[2] for *leg, share in legs)
    return read / compression.speed.encode + written / compression.speed.decode
