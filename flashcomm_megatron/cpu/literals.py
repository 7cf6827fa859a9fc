"""The word "cuda" in a script's calls, read as "cpu".

Scripts write ``torch.zeros(n, device="cuda")``, ``model.cuda()``, ``x.type() == "torch.cuda.FloatTensor"``. All of
these pass through torch's function mode, the mechanism behind ``torch.set_default_device``: :class:`Cpu` sees every
call of torch's Python API before it runs, changes what speaks of a GPU and leaves the rest as it is. Modes belong to a
thread, so threads started later enter it as well (a server answers each request in one).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..megatron.patching import Seam

CPU = torch.device("cpu")


def _device(value: Any) -> Any:
    """``value``, or the CPU if it names a GPU: "cuda", "cuda:1", a device."""
    named = isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))
    return CPU if named or (isinstance(value, torch.device) and value.type == "cuda") else value


def _type(tensor: Tensor, dtype: Any = None, *args: Any, **options: Any) -> Any:
    if dtype is None:
        return Tensor.type(tensor).replace("torch.", "torch.cuda.", 1)
    return Tensor.type(tensor, dtype.replace(".cuda", "") if isinstance(dtype, str) else dtype)


def _itself(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
    return tensor


def _new_device(kind: Any, *args: Any, **options: Any) -> Any:
    here = _device(kind)
    return here if isinstance(here, torch.device) else torch.device(kind, *args, **options)


CALLS: dict[Any, Callable[..., Any]] = {
    torch.device: _new_device,
    Tensor.cuda: _itself,  # there is one memory
    Tensor.pin_memory: _itself,  # no device copies from it
    Tensor.record_stream: lambda *args: None,  # memory is not reused behind a stream's back
    Tensor.type: _type,  # 'torch.cuda.HalfTensor' and its kin are compared as strings
}


class Cpu(TorchFunctionMode):
    """Answers the calls of ``CALLS``, and in all others replaces a device that is a GPU and unpins memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CALLS:
            return CALLS[func](*args, **kwargs)
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        if "device" in kwargs:
            kwargs = kwargs | {"device": _device(kwargs["device"])}
        return func(*map(_device, args), **kwargs)


_mode: Any = Cpu()
_overrides: Any = torch.overrides  # untyped


def enter() -> None:
    """From now on, in this thread. Idempotent."""
    if _mode not in _overrides._get_current_function_mode_stack():
        _mode.__enter__()


def leave() -> None:
    """No longer, wherever in the stack of modes it lies. Idempotent."""
    modes = _overrides._get_current_function_mode_stack()
    if _mode in modes:
        for _ in modes:
            _overrides._pop_mode()
        for mode in modes:
            if mode is not _mode:
                _overrides._push_mode(mode)


def _run(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: threading.Thread) -> None:
        with Cpu():
            original(self)

    return run


SEAMS = (Seam("threading", "Thread.run", ("self",), _run, "function modes belong to a thread: later threads enter it"),)
