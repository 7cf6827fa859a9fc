"""Megatron-Core without a GPU: the few names that must answer for the CPU before a model can be built and trained.

Megatron-Core is written for CUDA, yet little of it needs CUDA: it asks which device it is on, keeps its random streams
in CUDA generators, names the device "cuda" where it makes a causal mask, and its torch norms refuse sequence
parallelism. One row for each of these names, with the reason; patching.py applies and reverts them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..megatron.patching import Seam
from . import cuda


def _seed(original: Any) -> Callable[[int], Any]:
    return lambda seed: torch.manual_seed(seed)


def _fork(original: Any) -> Callable[..., Any]:
    @contextmanager
    def fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
        if name not in self.states_:
            raise RuntimeError(f"random stream {name!r} is unknown: call model_parallel_cuda_manual_seed(seed) first.")
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)

    return fork


def _causal_mask(original: Any) -> Callable[[int], torch.Tensor]:
    return lambda sq: torch.ones(sq, sq, dtype=torch.bool).triu(diagonal=1)


def _norm(original: Any) -> Callable[..., torch.nn.Module]:
    def build(cls: type, config: Any, *args: Any, **options: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm: torch.nn.Module = original(cls, plain, *args, **options)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    return build


CUDA, RANDOM = "torch.cuda", "megatron.core.tensor_parallel.random"
SEAMS = (
    Seam(CUDA, "current_device", (), cuda.always(torch.device("cpu")),
         "the device of every parameter and buffer that Megatron makes; looked up on torch.cuda at every call"),
    Seam(CUDA, "current_stream", (), cuda.new(cuda.Stream),
         "asked by data parallelism before gradients are summed (0.19); the CPU has always done everything"),
    Seam(CUDA, "manual_seed", ("seed",), _seed,
         "seeds the default random stream; without a GPU torch would queue the call for ever"),
    Seam(CUDA, "get_rng_state", ("device",), cuda.new(torch.get_rng_state),
         "reads the state of a stream that the tracker has just seeded"),
    Seam(RANDOM, "_get_cuda_rng_state", ("device",), cuda.new(torch.get_rng_state),
         "saves the stream for activation recomputation"),
    Seam(RANDOM, "_set_cuda_rng_state", ("new_state",), cuda.set_rng_state,
         "restores the stream after seeding and before recomputation"),
    Seam(RANDOM, "CudaRNGStatesTracker.fork", ("self", "name"), _fork,
         "switches streams around dropout; the original warns when the CPU's own stream moves, which here it must"),
    Seam("megatron.core.fusions.fused_softmax", "get_default_causal_mask", ("sq",), _causal_mask,
         'its device is the literal "cuda"; the attention softmax looks the name up here at every call'),
    Seam("megatron.core.transformer.torch_norm", "WrappedTorchNorm.__new__", ("cls", "config", "hidden_size"), _norm,
         "refuses sequence parallelism, wanting only the mark by which norm gradients are summed over ranks"),
)  # fmt: skip
