"""Devices, streams, events and graphs of the stand-in runtime, with the names and arguments of torch.cuda."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

runtime: Any = None  # cuda_runtime.h, called through ctypes
NOT_READY, CAPTURING = 600, "CUDA error: operation not permitted when stream is capturing"


def call(name: str, *arguments: Any) -> None:
    """A function of the runtime; RuntimeError with its error's name."""
    code = getattr(runtime, name)(*arguments)
    if code == 900:
        raise RuntimeError(CAPTURING)
    if code:
        raise RuntimeError(f"CUDA error: {runtime.cudaGetErrorName(code).decode()} from {name}")


def load(module: str) -> None:
    """Let ``module`` be the runtime."""
    global runtime
    runtime = ctypes.CDLL(module)
    runtime.cudaGetErrorName.restype = ctypes.c_char_p


kept: list[torch.Tensor] = []  # memory of tensors that went while something ran


def busy() -> bool:
    """Whether any stream holds work."""
    return any(runtime.cudaStreamQuery(each) == NOT_READY for each in streams)


HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_current = LEGACY = ctypes.c_void_p()  # stream
streams = [LEGACY]


class Stream:
    """A stream of the runtime."""

    def __init__(self, device: Any = None, priority: int = 0, handle: ctypes.c_void_p | None = None) -> None:
        if handle is None:
            handle = ctypes.c_void_p()
            call("cudaStreamCreate", ctypes.byref(handle))
            streams.append(handle)
        self._handle, self.device = handle, torch.device("cuda", current_device())
        self.cuda_stream = handle.value or 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return self.cuda_stream

    def launch(self, function: Callable[[Any], None]) -> None:
        """Let the worker call ``function`` in this stream's turn, or at each replay of the graph under way."""
        callback = HOST_FUNCTION(function)
        CUDAGraph.captured.append(callback)
        call("cudaLaunchHostFunc", self._handle, callback, None)

    def synchronize(self) -> None:
        call("cudaStreamSynchronize", self._handle)

    def query(self) -> bool:
        return runtime.cudaStreamQuery(self._handle) == 0

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        call("cudaStreamWaitEvent", self._handle, event._handle, 0)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Event:
    """An event of the runtime."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._handle, self._is_timed = ctypes.c_void_p(), enable_timing
        call("cudaEventCreate", ctypes.byref(self._handle))

    def record(self, stream: Stream | None = None) -> None:
        call("cudaEventRecord", self._handle, (stream or current_stream())._handle)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return runtime.cudaEventQuery(self._handle) == 0

    def synchronize(self) -> None:
        call("cudaEventSynchronize", self._handle)

    def elapsed_time(self, end: Event) -> float:
        if not self._is_timed or not end._is_timed:
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        found = ctypes.c_float()
        call("cudaEventElapsedTime", ctypes.byref(found), self._handle, end._handle)
        return found.value


class CUDAGraph:
    """What a stream was given while it was captured."""

    captured: ClassVar[list[Any]] = []  # of the capture under way: callbacks, which must live as long as the graph

    def __init__(self, keep_graph: bool = False) -> None:
        self._handle, self._callbacks = ctypes.c_void_p(), CUDAGraph.captured

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        call("cudaStreamBeginCapture", _current, 0)

    def capture_end(self) -> None:
        call("cudaStreamEndCapture", _current, ctypes.byref(self._handle))
        self._callbacks, CUDAGraph.captured = CUDAGraph.captured, []

    def replay(self) -> None:
        call("cudaGraphLaunch", self._handle, _current)

    def reset(self) -> None:
        call("cudaGraphDestroy", self._handle)


@contextmanager
def graph(cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, **options: Any) -> Iterator[None]:
    """Captures what runs inside, on a stream of its own."""
    synchronize()
    with stream_context(stream or Stream()):
        cuda_graph.capture_begin()
        try:
            yield
        finally:
            cuda_graph.capture_end()


@contextmanager
def stream_context(stream: Stream | None) -> Iterator[None]:
    global _current
    before = _current
    if stream is not None:
        _current = stream._handle
    try:
        yield
    finally:
        _current = before


def set_stream(stream: Stream) -> None:
    global _current
    _current = stream._handle


def current_stream(device: Any = None) -> Stream:
    return Stream(handle=_current)


def default_stream(device: Any = None) -> Stream:
    return Stream(handle=LEGACY)


def synchronize(device: Any = None) -> None:
    call("cudaDeviceSynchronize")
    kept.clear()


def is_current_stream_capturing() -> bool:
    found = ctypes.c_int()
    runtime.cudaStreamIsCapturing(_current, ctypes.byref(found))
    return bool(found.value)


sync_debug_mode: int | str = "default"


def set_sync_debug_mode(debug_mode: int | str) -> None:
    global sync_debug_mode
    sync_debug_mode = debug_mode


def device_count() -> int:
    found = ctypes.c_int()
    call("cudaGetDeviceCount", ctypes.byref(found))
    return found.value


def current_device() -> int:
    found = ctypes.c_int()
    call("cudaGetDevice", ctypes.byref(found))
    return found.value


def set_device(device: Any) -> None:
    call("cudaSetDevice", _index(device))


def _index(device: Any) -> int:
    if isinstance(device, int):
        return device
    found = torch.device(device).index
    return current_device() if found is None else found


@contextmanager
def device(wanted: Any) -> Iterator[None]:
    """Works on another GPU for a while."""
    before = current_device()
    set_device(before if wanted is None else wanted)
    try:
        yield
    finally:
        set_device(before)


def mem_get_info(device: Any = None) -> tuple[int, int]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value
