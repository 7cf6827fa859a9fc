"""torch.cuda on the stand-in runtime: tensors that say they are on a GPU, streams, events and graphs.

A :class:`DeviceTensor` reports ``cuda`` and holds a tensor of the CPU, whose memory kernels are given. Torch's
operators on it wait for what the current stream holds, as stream order has it on a GPU, and then run on the CPU;
tensors of both kinds do not mix. Memory is kept until nothing runs that may use it. While a stream is captured,
operators join the graph, and what would wait for the device is refused. Bytes of new memory are 0xFF, NaN to most
readers, so what reads it before it is written is seen.

:func:`install` puts all that into ``torch.cuda`` and gives flashcomm_megatron's extension its CUDA half (build.py).
Only processes that find ``sitecustomize.py``, beside this file, on their path do that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CROSSES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}  # takes both kinds
FRESH = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}

runtime: Any = None  # cuda_runtime.h, called through ctypes
NOT_READY, CAPTURING = 600, "CUDA error: operation not permitted when stream is capturing"


def call(name: str, *arguments: Any) -> None:
    """A function of the runtime; RuntimeError with its error's name."""
    code = getattr(runtime, name)(*arguments)
    if code == 900:
        raise RuntimeError(CAPTURING)
    if code:
        raise RuntimeError(f"CUDA error: {runtime.cudaGetErrorName(code).decode()} from {name}")


# ---- tensors ---------------------------------------------------------------------------------------------------


class DeviceTensor(torch.Tensor):
    """A tensor of device "cuda" whose values are those of ``held``, a tensor of the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: int) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("cuda", device),
        )

    def __init__(self, held: torch.Tensor, device: int) -> None:
        self.held = held

    def __del__(self) -> None:
        if busy is not None and busy():
            kept.append(self.held)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **options: Any) -> str:
        return f"{self.device}: {self.cpu()!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})


class OnDevice(TorchDispatchMode):
    """Makes tensors that are asked for on "cuda"."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})


kept: list[torch.Tensor] = []  # memory of tensors that went while something ran


def busy() -> bool:
    """Whether any stream holds work."""
    return any(runtime.cudaStreamQuery(each) == NOT_READY for each in streams)


def operate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One of torch's operators, on the kind of device its tensors and ``device`` say."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [each for each in tensors if isinstance(each, DeviceTensor)]
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if not ours and (target is None or target.type != "cuda"):
        return func(*args, **kwargs)
    leaves = target is not None and target.type != "cuda"
    plain = [each for each in tensors if not isinstance(each, DeviceTensor) and (each.dim() or target)]
    if ours and plain and func not in CROSSES:
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, found at least two, cuda and cpu")
    if leaves or plain or _tells(func):
        _refuse_to_wait()
    where = ours[0].device.index if ours else current_device()
    if target is not None and target.index is not None:
        where = target.index
    known = {id(each.held): each for each in ours}

    def on_device(found: Any) -> Any:
        if not isinstance(found, torch.Tensor):
            return found
        return known[id(found)] if id(found) in known else DeviceTensor(found, where)

    args, kwargs = tree_map(lambda each: each.held if isinstance(each, DeviceTensor) else each, (args, kwargs))
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    found = (_captured if is_current_stream_capturing() else _at_once)(func, args, kwargs)
    return found if leaves else tree_map(on_device, found)


def _tells(func: Any) -> bool:
    """Whether an operator's result is a number: the device must be waited for."""
    returns = func._schema.returns
    return bool(returns) and not any("Tensor" in str(each.type) for each in returns)


def _refuse_to_wait() -> None:
    if is_current_stream_capturing():
        raise RuntimeError(CAPTURING)
    if _sync_debug_mode == "error":
        raise RuntimeError("called a synchronizing CUDA operation")


def _at_once(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    call("cudaStreamSynchronize", _current)
    if kept and not busy():
        kept.clear()
    found = func(*args, **kwargs)
    if func in FRESH and found.is_contiguous() and found.numel():
        found.view(-1).view(torch.uint8).fill_(255)
    return found


def _captured(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Put an operator into the graph. What is new it makes at once, so that later ones may be given it."""
    outputs = None if func._schema.is_mutable else func(*args, **kwargs)
    made = [each for each in tree_leaves(outputs) if isinstance(each, torch.Tensor)]

    def again(_: Any) -> None:
        found = func(*args, **kwargs)
        for target, each in zip(made, tree_leaves(found), strict=False):
            target.copy_(each)

    callback = HOST_FUNCTION(again)
    CUDAGraph.captured.append(callback)
    call("cudaLaunchHostFunc", _current, callback, None)
    return args[0] if outputs is None else outputs


HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# ---- torch.cuda --------------------------------------------------------------------------------------------------

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
    with _on(stream or Stream()):
        cuda_graph.capture_begin()
        try:
            yield
        finally:
            cuda_graph.capture_end()


@contextmanager
def _on(stream: Stream | None) -> Iterator[None]:
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


_sync_debug_mode: int | str = "default"


def set_sync_debug_mode(debug_mode: int | str) -> None:
    global _sync_debug_mode
    _sync_debug_mode = debug_mode


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


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **options: value


def _made_here(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch.tensor`` and its like ask no mode where to make a tensor: make it on the CPU, then move it."""

    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return make(*args, **options) if device is None else make(*args, **options).to(device)

    return made


PROPERTIES = SimpleNamespace(
    name="stand-in for a GPU", major=9, minor=0, multi_processor_count=10, total_memory=1 << 30
)
REPLACED = {
    **{each.__name__: each for each in (Stream, Event, CUDAGraph, graph, set_stream, current_stream, default_stream)},
    **{each.__name__: each for each in (synchronize, is_current_stream_capturing, device_count, current_device)},
    **{each.__name__: each for each in (set_device, device, mem_get_info, set_sync_debug_mode)},
    "stream": _on,
    "is_available": lambda: device_count() > 0,
    "is_initialized": _always(True),
    "_lazy_init": _always(None),
    "empty_cache": _always(None),
    "get_device_name": _always(PROPERTIES.name),
    "get_device_capability": _always((PROPERTIES.major, PROPERTIES.minor)),
    "get_device_properties": _always(PROPERTIES),
}


def install(module: str) -> None:
    """Let this process have a GPU, by ``cuda_half`` at the path ``module``."""
    global runtime
    loader = ExtensionFileLoader("cuda_half", module)
    half = module_from_spec(ModuleSpec("cuda_half", loader, origin=module))
    loader.exec_module(half)
    runtime = ctypes.CDLL(module)
    runtime.cudaGetErrorName.restype = ctypes.c_char_p
    for name, value in REPLACED.items():
        setattr(torch.cuda, name, value)
    torch.tensor, torch.as_tensor = map(_made_here, (torch.tensor, torch.as_tensor))
    OnDevice().__enter__()
    _graft(half)


def _graft(half: Any) -> None:
    """The extension that is built, with this CUDA half in the place of its own or of none."""
    from flashcomm_megatron import extension

    whole: Any = extension.module()
    told = whole.info
    for name in dir(half):
        if not name.startswith("__"):
            setattr(whole, name, getattr(half, name))
    whole.info = lambda: {**told(), "cuda": PROPERTIES.name, "without_cuda": ""}
