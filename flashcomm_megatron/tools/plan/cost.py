"""The cost of one collective, and of one step of a model: what the planner and the link lab both reckon with.

A collective costs the latency of its exchanges, the bytes it sends over the link's rate, and the codec's work over the
codec's speed; the latter two one after the other, unless the plan cuts the tensor into pieces, which overlap. Bytes
are those of the real codecs and algorithms, decisions the real plan's. :func:`predict` is the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from ...codec.recipes import RECIPES
from ...collectives.plan import Plan, exact_bytes, plan
from ...comm.simulated import Simulated
from ...config import Config
from .hardware import MEMORY_EFFICIENCY, Gpu, Link


class Message(NamedTuple):
    """``times`` equal collectives over ``numel`` values on every rank; of an all_gather, before it."""

    collective: str  # "all_reduce", "reduce_scatter" or "all_gather"
    numel: int
    world: int
    times: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Work(NamedTuple):
    """What one rank's codec does in one collective, in bytes of uncompressed values, and of all it reads and writes."""

    encoded: float
    decoded: float
    encode_moved: float
    decode_moved: float


class Speed(Protocol):
    """How fast a codec works."""

    def seconds(self, work: Work) -> float:
        """Time of ``work``."""


@dataclass(frozen=True)
class Streaming:
    """A codec as fast as memory: bytes read and written per second. GPUs; what make gpu-check measures."""

    encode: float
    decode: float

    def seconds(self, work: Work) -> float:
        return work.encode_moved / self.encode + work.decode_moved / self.decode


@dataclass(frozen=True)
class Computing:
    """A codec as fast as its arithmetic: bytes of values per second. CPUs; what benchmarks/bench_codec.py measures."""

    encode: float
    decode: float

    def seconds(self, work: Work) -> float:
        return work.encoded / self.encode + work.decoded / self.decode


@dataclass(frozen=True)
class Codec:
    """What compresses: a configuration, how fast its codecs run, and what joins the ranks (comm/communicator.py)."""

    config: Config
    speed: Speed
    wire: str = "cuda"


def assumed_speed(gpu: Gpu) -> Streaming:
    """Codecs limited by the GPU's memory, where none was measured."""
    rate = gpu.memory_rate * MEMORY_EFFICIENCY
    return Streaming(rate, rate)


def predict(link: Link, compute_seconds: float, messages: Iterable[Message], codec: Codec | None = None) -> float:
    """Seconds of one step: its compute, then each of its collectives, by ``codec`` where the plan says so.

    ``codec`` None: all exact.
    """
    return compute_seconds + sum(message.times * seconds(link, message, codec) for message in messages)


def seconds(link: Link, message: Message, codec: Codec | None) -> float:
    """Seconds of one collective."""
    plan = None if codec is None else plan_of(message, codec)
    if codec is None or plan is None or plan.deferred:
        return _exact(link, message)
    sent, exchanges = wire_bytes(message, plan), _exchanges(message, plan)
    waits = link.latency + link.codec_latency + exchanges * (link.step + (message.world - 1) * link.message)
    drained = sent / link.drain if link.drain else 0.0
    wire, coding = sent / link.send_rate(message.world), codec.speed.seconds(work(message, plan, codec))
    return waits + drained + max(wire, coding) + min(wire, coding) / pieces(message, plan)


def pieces(message: Message, plan: Plan) -> int:
    """How many pieces are under way together; 1 where nothing overlaps."""
    return len(plan.pieces)


def plan_of(message: Message, codec: Codec) -> Plan:
    """The collectives' plan for a tensor like this; ``deferred`` says why it stays exact."""
    return _plan_of(message, codec.config, codec.wire)


@lru_cache(maxsize=4096)
def _plan_of(message: Message, config: Config, kind: str) -> Plan:
    comm = Simulated(0, message.world, kind=kind)
    return plan(message.collective, (message.numel,), message.dtype, torch.device("cpu"), comm, config)


def wire_bytes(message: Message, plan: Plan) -> int:
    """Bytes that one rank sends."""
    return plan.wire_bytes


def work(message: Message, plan: Plan, codec: Codec) -> Work:
    """What the codec of one rank has to do."""
    _, numel, world, *_ = message
    if message.collective == "all_gather":
        total = _gather(message.nbytes, plan.gather.wire_bytes(numel), world)
    elif message.collective == "all_reduce" and plan.algorithm == "one-step":
        wire = plan.reduce.wire_bytes(numel)
        total = [message.nbytes, world * message.nbytes, message.nbytes + wire, world * wire + message.nbytes]
    else:
        total = _reduce(message.nbytes, plan.reduce.wire_bytes(numel), world)
        if message.collective == "all_reduce":
            part = plan.gather.wire_bytes(-(-numel // world))
            total = [a + b for a, b in zip(total, _gather(message.nbytes / world, part, world), strict=True)]
    if RECIPES[codec.config.recipe].feedback:  # what was lost is read and written with every value encoded
        total[2] += 2 * total[0]
    return Work(*total)


def _reduce(nbytes: float, wire: float, world: int) -> list[float]:
    """Encode a tensor, decode and add as many values from all ranks into one slice."""
    return [nbytes, nbytes, nbytes + wire, wire + nbytes / world]


def _gather(nbytes: float, wire: float, world: int) -> list[float]:
    """Encode a slice, decode everybody's."""
    return [nbytes, world * nbytes, nbytes + wire, world * (wire + nbytes)]


def _exact(link: Link, message: Message) -> float:
    """The better of a ring and, where there is one, the switch that adds."""
    steps = (message.world - 1) * (2 if message.collective == "all_reduce" else 1)
    sent = exact_bytes(message.collective, message.nbytes, message.world)
    ring = link.latency + steps * (link.step + link.message) + sent / link.send_rate(message.world)
    if link.multicast is None or message.collective != "all_reduce":
        return ring
    return min(ring, link.latency + message.nbytes / link.multicast)


def _exchanges(message: Message, plan: Plan) -> int:
    return 2 if message.collective == "all_reduce" and plan.algorithm == "two-step" else 1
