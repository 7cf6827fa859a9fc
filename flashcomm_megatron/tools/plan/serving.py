"""Time to first token, tokens per second and a training step under tensor parallelism, exact and compressed.

Prefill computes at the rate of large matrix products, decoding at the rate weights and cache are read from memory. A
training step is forward and backward of the same tokens: three times prefill's products, and its sums twice, in
backward at the gradients' width. Nothing else is counted (norms, sampling, scheduling, launches; optimizer, data and
pipeline parallelism), so absolute times are lower bounds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from .cost import BYTES, Collective, Compression, seconds
from .hardware import MEMORY_EFFICIENCY, Gpu, Link
from .models import Model


class Job(NamedTuple):
    """Prompts of ``seq`` tokens in ``batch`` sequences, served by ``tp`` GPUs."""

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

    def sums(self, tokens: int) -> Collective:
        """The all-reduces of one forward over ``tokens`` tokens of each sequence."""
        return Collective("all_reduce", self.batch * tokens * self.model.hidden, self.tp, self.model.sums)

    @property
    def prefill_seconds(self) -> float:
        """Matrix products of the prompt."""
        return max(self._products(self.seq), self._read(self.model.weights * BYTES / self.tp))

    @property
    def decode_seconds(self) -> float:
        """Weights and cache read once, or the products of one token, whatever takes longer."""
        return max(self._products(1), self._read(self.memory))

    def _products(self, tokens: int) -> float:
        operations = self.model.prefill_operations(self.batch, tokens)
        return operations / self.tp / (self.gpu.peak * self.gpu.matmul)

    def _read(self, nbytes: float) -> float:
        return nbytes / (self.gpu.memory_rate * MEMORY_EFFICIENCY)


class Times(NamedTuple):
    """Seconds of one job."""

    all_reduce: float  # one of prefill's
    ttft: float  # time to first token
    token: float  # one decoding step of the whole batch
    communication: float  # share of ttft
    training: float  # forward and backward of the prompt's tokens


def times(job: Job, compression: Compression | None) -> Times:
    """Of ``job``; ``compression`` None: exact."""
    prompt, token = job.sums(job.seq), job.sums(1)
    ttft = job.prefill_seconds + seconds(job.link, prompt, compression)
    one = seconds(job.link, prompt._replace(times=1), compression)
    step = job.decode_seconds + seconds(job.link, token, compression)
    if compression is not None:
        compression = replace(compression, config=replace(compression.config, bits=compression.config.grad_bits))
    training = ttft + 2 * job.prefill_seconds + seconds(job.link, prompt, compression)
    return Times(one, ttft, step, 1 - job.prefill_seconds / ttft, training)
