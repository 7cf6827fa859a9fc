"""Tensors that say they are on a GPU.

A :class:`DeviceTensor` reports ``cuda`` and holds a tensor of the CPU, whose memory kernels are given. Torch's
operators on it wait for what the current stream holds, as stream order has it on a GPU, and then run on the CPU;
tensors of both kinds do not mix. Memory is kept until nothing runs that may use it. While a stream is captured,
operators join the graph, and what would wait for the device is refused. Bytes of new memory are 0xFF, NaN to most
readers, so what reads it before it is written is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import streams
from .streams import CAPTURING, current_device, is_current_stream_capturing, kept

aten = torch.ops.aten
CROSSES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}  # takes both kinds
FRESH = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}


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
        if streams is not None and streams.busy():
            kept.append(self.held)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def record_stream(self, stream: Any) -> None:
        """Nothing: while a stream is busy no memory is given away."""

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
    if streams.sync_debug_mode == "error":
        raise RuntimeError("called a synchronizing CUDA operation")


def _at_once(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    streams.current_stream().synchronize()
    if kept and not streams.busy():
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

    streams.current_stream().launch(again)
    return args[0] if outputs is None else outputs


def made_here(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch.tensor`` and its like ask no mode where to make a tensor: make it on the CPU, then move it."""

    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return make(*args, **options) if device is None else make(*args, **options).to(device)

    return made
