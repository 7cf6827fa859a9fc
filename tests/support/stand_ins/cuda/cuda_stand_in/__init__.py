"""torch.cuda on the stand-in runtime, for processes that find ``sitecustomize.py``, beside this folder, on their path.

:func:`install` gives such a process streams, events and graphs (streams.py), tensors that say they are on a GPU
(tensors.py), and flashcomm_megatron's extension its CUDA half (../build.py).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from types import SimpleNamespace
from typing import Any

import torch

from . import streams, tensors


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **options: value


PROPERTIES = SimpleNamespace(
    name="stand-in for a GPU", major=9, minor=0, multi_processor_count=10, total_memory=1 << 30
)
SAME = "Stream Event CUDAGraph graph set_stream current_stream default_stream synchronize is_current_stream_capturing"
SAME += " device_count current_device set_device device mem_get_info set_sync_debug_mode"
REPLACED = {
    **{name: getattr(streams, name) for name in SAME.split()},
    "stream": streams.stream_context,
    "is_available": lambda: streams.device_count() > 0,
    "is_initialized": _always(True),
    "_lazy_init": _always(None),
    "empty_cache": _always(None),
    "get_device_name": _always(PROPERTIES.name),
    "get_device_capability": _always((PROPERTIES.major, PROPERTIES.minor)),
    "get_device_properties": _always(PROPERTIES),
}


def install(module: str) -> None:
    """Let this process have a GPU, by ``cuda_half`` at the path ``module``."""
    streams.load(module)
    loader = ExtensionFileLoader("cuda_half", module)
    half = module_from_spec(ModuleSpec("cuda_half", loader, origin=module))
    loader.exec_module(half)
    for name, value in REPLACED.items():
        setattr(torch.cuda, name, value)
    torch.tensor, torch.as_tensor = map(tensors.made_here, (torch.tensor, torch.as_tensor))
    tensors.OnDevice().__enter__()
    _graft(half)


def _graft(half: Any) -> None:
    """The extension that is built, with this CUDA half in the place of its own or of none."""
    from flashcomm_megatron.codec import native as extension

    whole: Any = extension.module()
    told = whole.info
    for name in dir(half):
        if not name.startswith("__"):
            setattr(whole, name, getattr(half, name))
    whole.info = lambda: {**told(), "cuda": PROPERTIES.name, "without_cuda": ""}
