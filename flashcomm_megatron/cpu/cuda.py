"""torch.cuda without a GPU: what scripts ask of the device, its streams, its memory and its random numbers.

A CPU computes when it is called, so streams and events order nothing, waiting returns at once, and no device memory is
in use. One device for each rank of this machine stands in for the GPUs that scripts count. What only a GPU has, and a
script cannot do without, raises :class:`NeedsGPU` with one sentence.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from ..megatron.patching import Seam


class NeedsGPU(RuntimeError):
    """Something that CPU mode cannot do; the message is one sentence for the user."""


class Stream(torch.Stream):
    """A stream that orders nothing, because the CPU has done everything it was told."""

    cuda_stream = 0

    def __new__(cls, *args: Any, **options: Any) -> Stream:
        return super().__new__(cls, stream_id=0, device_index=0, device_type=0)

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def query(self) -> bool:
        return True

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record()
        return event


class Event:
    """A moment: recording reads the clock, everything else has happened already."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this moment to ``end``."""
        return (end._seconds - self._seconds) * 1e3

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class CUDAGraph:
    """Refuses to be captured."""

    def __init__(self, *args: Any, **options: Any) -> None:
        raise NeedsGPU("CUDA graphs need a GPU: leave --cuda-graph-impl and --enable-cuda-graph out.")


def always(value: Any) -> Callable[[Any], Callable[..., Any]]:
    """A replacement that answers ``value`` whatever it is asked."""
    return lambda original: lambda *args, **options: value


def new(kind: Callable[[], Any]) -> Callable[[Any], Callable[..., Any]]:
    """A replacement that answers a new ``kind()`` at every call."""
    return lambda original: lambda *args, **options: kind()


def instead(kind: type) -> Callable[[Any], type]:
    """A replacement that is a class itself, so isinstance works."""
    return lambda original: kind


def _seed(original: Any) -> Callable[[int], Any]:
    return lambda seed: torch.default_generator.manual_seed(int(seed))


def set_rng_state(original: Any) -> Callable[..., None]:
    """A replacement that sets the CPU's random state, the only one there is."""
    return lambda new_state, *args, **options: torch.set_rng_state(new_state)


PROPERTIES = SimpleNamespace(
    name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count() or 1, gcnArchName="cpu"
)

CUDA, NVTX = "torch.cuda", "torch.cuda.nvtx"
SEAMS = (
    Seam(CUDA, "is_available", (), always(True), 'scripts stop at once without ("Megatron requires CUDA")'),
    Seam(CUDA, "is_initialized", (), always(True), "asked before random states are saved"),
    Seam(CUDA, "device_count", (), new(lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
         "without devices no model-parallel group is made"),
    Seam(CUDA, "set_device", (), always(None), "each rank chooses a GPU"),
    Seam(CUDA, "device", (), new(nullcontext), "works on another GPU for a while"),
    Seam(CUDA, "get_device_name", (), always("cpu"), "printed"),
    Seam(CUDA, "get_device_capability", (), always((0, 0)), "kernels are chosen by it: those for the oldest GPU"),
    Seam(CUDA, "get_device_properties", (), always(PROPERTIES), "printed, and kernels are chosen by it"),
    Seam(CUDA, "synchronize", (), always(None), "timers and savers wait for the device; the CPU is always done"),
    Seam(CUDA, "Stream", (), instead(Stream), "made for overlapping communication"),
    Seam(CUDA, "ExternalStream", (), instead(Stream), "made for overlapping communication"),
    Seam(CUDA, "Event", (), instead(Event), "orders streams, times steps"),
    Seam(CUDA, "default_stream", (), new(Stream), "waited for"),
    Seam(CUDA, "stream", (), new(nullcontext), "work inside runs where all work runs"),
    Seam(CUDA, "set_stream", (), always(None), "later work runs where all work runs"),
    Seam(CUDA, "CUDAGraph", (), instead(CUDAGraph), "cannot be: says so"),
    Seam(CUDA, "memory_stats", (), new(lambda: defaultdict(int)), "statistics of a memory that is not there: all zero"),
    *(Seam(CUDA, name, (), always(0), "statistics of a memory that is not there: zero")
      for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")),
    Seam(CUDA, "mem_get_info", (), always((0, 0)), "free and total bytes of a memory that is not there"),
    *(Seam(CUDA, name, (), always(None), "tidies a memory that is not there")
      for name in ("empty_cache", "reset_peak_memory_stats", "ipc_collect")),
    Seam(CUDA, "manual_seed_all", ("seed",), _seed, "seeds the default random stream; torch.manual_seed calls it too"),
    Seam(CUDA, "set_rng_state", ("new_state",), set_rng_state, "a checkpoint restores what get_rng_state read"),
    Seam(CUDA, "initial_seed", (), new(torch.initial_seed), "seed of the default random stream"),
    *(Seam(CUDA, f"{kind}Tensor", (), instead(getattr(torch, f"{kind}Tensor")), "makes a tensor, or is asked about one")
      for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")),
    *(Seam(NVTX, name, (), always(None), "marks a range for a profiler")
      for name in ("range_push", "range_pop", "mark")),
    Seam(NVTX, "range", (), new(nullcontext), "marks a range for a profiler"),
)  # fmt: skip
