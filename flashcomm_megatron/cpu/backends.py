"""What stands under a script: the process group's backend, compilers, and kernels that only a GPU runs.

Collectives run over gloo whatever backend is named; gloo lacks the mean, which is a sum divided by the ranks. Nothing
is compiled or scripted: torch.compile wants a compiler at every start and changes roundings.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from sysconfig import get_config_var
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from ..megatron.patching import Seam
from .cuda import NeedsGPU, always


def _gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    def over_gloo(*args: Any, **options: Any) -> Any:
        options.pop("device_id", None)
        return original(*args, **options | {"backend": "gloo", "pg_options": None})

    return over_gloo


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_process_group(backend: Any = None, *args: Any, **options: Any) -> Any:
        return _gloo(original)(*args, **options)

    return init_process_group


def _mean(original: Callable[..., Any]) -> Callable[..., Any]:
    def all_reduce(tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if op != dist.ReduceOp.AVG:
            return original(tensor, op, group, async_op)
        tensor.div_(dist.get_world_size(group))
        return original(tensor, dist.ReduceOp.SUM, group, async_op)

    return all_reduce


def _not_compiled(original: Any) -> Callable[..., Any]:
    def leave(function: Any = None, *args: Any, **options: Any) -> Any:
        return function if callable(function) else lambda later: later

    return leave


def _without_main(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_preparation_data(name: str) -> dict[str, Any]:
        return {key: value for key, value in original(name).items() if not key.startswith("init_main")}

    return get_preparation_data


def _own_seed(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, loader: Any) -> None:
        state = torch.get_rng_state()
        original(self, loader)
        torch.set_rng_state(state)

    return __init__


DISTRIBUTED = "torch.distributed"
SEAMS = (
    Seam(DISTRIBUTED, "init_process_group", ("backend",), _init, "NCCL needs GPUs; gloo serves"),
    Seam(DISTRIBUTED, "new_group", ("ranks", "timeout", "backend", "pg_options"), _gloo, "the same for subgroups"),
    Seam(DISTRIBUTED, "all_reduce", ("tensor", "op", "group", "async_op"), _mean, "gloo has no mean"),
    Seam("torch", "compile", ("model",), _not_compiled, "Megatron compiles small functions when it is imported"),
    Seam("torch.jit", "script", ("obj",), _not_compiled, "older Megatron scripts them"),
    Seam("torch.utils.data.dataloader", "_BaseDataLoaderIter.__init__", ("self", "loader"), _own_seed,
         "draws its workers' seed from the stream that here is the model's: a resumed run would drop out others"),
    Seam("torch.accelerator", "is_available", (), always(False),
         "data loaders pin memory where there is one; a torch built for CUDA answers by torch.cuda.is_available"),
    Seam("multiprocessing.spawn", "get_preparation_data", ("name",), _without_main,
         "a spawned child, like the queue of the checkpoint's writers, would import the script without CPU mode"),
)  # fmt: skip


def _for_this_python(original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        with patch.dict(os.environ, MAKEFLAGS=f"LIBEXT={get_config_var('EXT_SUFFIX')}", PATH=path):
            original()

    return compile_helpers


def _as_asked(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, *args: Any, **options: Any) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def _mesh(original: Any) -> Any:
    """torch's DeviceMesh, of which Megatron calls ``from_group(group, "cuda")``."""
    return SimpleNamespace(from_group=lambda group, kind: original.from_group(group, "cpu"))


def _latent(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, k_channels: Any = None, v_channels: Any = None, **options: Any) -> None:
        original(self, *args, **options)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return __init__


def _dynamic(original: Any) -> Callable[..., None]:
    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise NeedsGPU("Dynamic batching needs flash-attention, which needs a GPU: use gpt_static_inference.py.")

    return refuse


CORE = "megatron.core"
# Not every version, nor the wheel, has these.
MEGATRON = (
    Seam("megatron.legacy.fused_kernels", "load", ("args",), always(None), "compiles CUDA kernels at the start"),
    Seam(f"{CORE}.datasets.utils", "compile_helpers", (), _for_this_python,
         "its Makefile asks python3-config, which a virtual environment lacks, what this Python calls an extension"),
    Seam(f"{CORE}.inference.contexts.dynamic_context", "DynamicInferenceContext.__init__", ("self",), _dynamic,
         "cannot be: says so; the static engine, which tries it first, then takes its own way"),
    Seam(f"{CORE}.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", ("tensor",), _as_asked,
         "turns token counts into numbers only on their way from a GPU; gloo takes no others"),
    Seam(f"{CORE}.distributed.torch_fully_sharded_data_parallel", "DeviceMesh", (), _mesh,
         'its device is the literal "cuda"'),
    Seam(f"{CORE}.transformer.dot_product_attention", "DotProductAttention.__init__", ("self",), _latent,
         "knows no values of another width than its keys, which latent attention has; only Transformer Engine's does"),
    *(Seam(module, "_is_cuda", ("tensor",), always(None), "insists that what a server broadcasts lies on a GPU")
      for module in (f"{CORE}.inference.communication_utils", "megatron.inference.text_generation.communication")),
)  # fmt: skip


# Module, name, value: read without Transformer Engine, but only defined with it (the router of 0.16).
UNDEFINED = ((f"{CORE}.transformer.moe.moe_utils", "te_general_gemm", None),)
_defined: list[tuple[Any, str]] = []


def enter() -> None:
    """Define the names of ``UNDEFINED`` that are not. Idempotent."""
    for module, name, value in UNDEFINED:
        owner = importlib.import_module(module)
        if not hasattr(owner, name):
            setattr(owner, name, value)
            _defined.append((owner, name))


def leave() -> None:
    """Undefine them again. Idempotent."""
    while _defined:
        delattr(*_defined.pop())


def present() -> list[Seam]:
    """Rows of ``MEGATRON`` that this version has."""
    rows = []
    for seam in MEGATRON:
        with suppress(ImportError):
            rows += [seam] if find_spec(seam.module) is not None else []
    return rows
