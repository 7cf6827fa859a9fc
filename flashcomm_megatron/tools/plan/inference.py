"""Time to first token and tokens per second of a model under tensor parallelism, exact and compressed.

Prefill computes at the rate of large matrix products, decoding at the rate weights and cache are read from memory.
Nothing else is counted (norms, sampling, scheduling, launches), so absolute times are lower bounds.
"""

from __future__ import annotations

from typing import NamedTuple

from .cost import Codec, Message, predict
from .hardware import MEMORY_EFFICIENCY, Gpu, Link
from .models import BYTES, Model


class Job(NamedTuple):
    """A prompt of ``seq`` tokens in ``batch`` sequences, served by ``tp`` GPUs."""

    gpu: Gpu
    link: Link
    model: Model
    tp: int
    batch: int
    seq: int

    @property
    def memory(self) -> float:
        """Bytes a GPU holds: its share of weights and cache."""
        return (self.model.weights * BYTES + self.model.cache_bytes(self.batch, self.seq)) / self.tp


class Inference(NamedTuple):
    """Seconds."""

    all_reduce: float  # one of prefill's
    ttft: float  # time to first token
    token: float  # one decoding step of the whole batch
    communication: float  # share of ttft


def infer(job: Job, codec: Codec | None) -> Inference:
    """Times of ``job``; ``codec`` None: exact."""
    compute, per_token = prefill_seconds(job), decode_seconds(job)
    prefill, decode = messages(job, job.seq), messages(job, 1)
    ttft = predict(job.link, compute, prefill, codec)
    one = predict(job.link, 0.0, [prefill[0]._replace(times=1)], codec) if prefill else 0.0
    return Inference(one, ttft, predict(job.link, per_token, decode, codec), 1 - compute / ttft)


def messages(job: Job, tokens: int) -> list[Message]:
    """The all-reduces of one forward over ``tokens`` tokens of each sequence."""
    numel = job.batch * tokens * job.model.hidden
    return [Message("all_reduce", numel, job.tp, job.model.sums)] if job.tp > 1 else []


def prefill_seconds(job: Job) -> float:
    """Matrix products of the prompt."""
    operations = job.model.prefill_operations(job.batch, job.seq)
    return max(operations / job.tp / (job.gpu.peak * job.gpu.matmul), _read(job, job.model.weights * BYTES))


def decode_seconds(job: Job) -> float:
    """Weights and cache read once, or the products of one token, whatever takes longer."""
    operations = job.model.prefill_operations(job.batch, 1)
    return max(operations / job.tp / (job.gpu.peak * job.gpu.matmul), _read(job, job.memory * job.tp))


def _read(job: Job, nbytes: float) -> float:
    return nbytes / job.tp / (job.gpu.memory_rate * MEMORY_EFFICIENCY)
