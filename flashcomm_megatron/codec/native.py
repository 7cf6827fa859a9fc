"""The compiled extension ``flashcomm_megatron._C``, if it was built; the definition in torch serves where it cannot.

``encode_slices``, ``reduce_slices`` and ``decode_slices`` make one native call each. They return False when the
extension is missing or does not serve the codec, the device or the shape; the caller then runs the definition, whose
results are the same bits. Shapes, dtypes, devices, contiguity and lengths are checked here, before an address is handed
over: the extension itself sees raw addresses only.

The extension knows a codec by its attribute ``native``, (format, bits, block), where ``format`` is an enum of
csrc/api.h. ``FLASH_COMM_EXTENSION=0`` forces the definition.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Codec, Slices

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Dtype in csrc/api.h
INTERFACE = 8  # kInterface in csrc/api.h
BYTES = (torch.uint8,)
Native = tuple[int, int, int]  # (format, bits, block)


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason."""
    if os.environ.get("FLASH_COMM_EXTENSION") == "0":
        return None, "FLASH_COMM_EXTENSION=0"
    try:
        found = importlib.import_module("flashcomm_megatron._C")
    except ModuleNotFoundError:
        return None, "not built: run pip install -e ."
    except ImportError as error:
        return None, f"cannot be loaded, run pip install -e . again: {error}"
    if getattr(found, "interface", None) != INTERFACE:
        return None, "built from other sources than these: run pip install -e . again"
    return found, ""


_extension, _reason = _load()


def available() -> bool:
    """Whether the compiled codec serves tensors in main memory."""
    return _extension is not None


def reason() -> str:
    """Why the extension or its CUDA part is missing; empty when nothing is."""
    return _reason if _extension is None else info()["without_cuda"]


def info() -> dict[str, Any]:
    """What was compiled in: isas (best first), isa (in use), formats, cuda, without_cuda; empty if not available."""
    return {} if _extension is None else _extension.info()


def module() -> ModuleType | None:
    """The extension, for what is not a codec: comm/shared_memory.py."""
    return _extension


def cuda() -> ModuleType | None:
    """The extension if it has CUDA kernels: comm/fused.py runs whole collectives with them."""
    return _extension if info().get("cuda") else None


@lru_cache(4096)
def has_cuda_kernel(native: Native, dtype: torch.dtype, numel: int = 1, width: int = 0) -> bool:
    """Whether the extension codes tensors of this dtype and shape on GPUs for the codec known by ``native``."""
    kernels = cuda()
    return kernels is not None and bool(kernels.has_codec_cuda(DTYPES[dtype], *native, numel, width))


def describe() -> str:
    """Which codec serves, in a phrase: "compiled codec (avx512; CUDA sm_80 sm_90 compute_90)"."""
    if _extension is None:
        return f"PyTorch codec ({_reason})"
    found = info()
    return f"compiled codec ({found['isa']}; {'CUDA ' + found['cuda'] if found['cuda'] else found['without_cuda']})"


def encode_slices(codec: Codec, x: Tensor, slices: Slices, out: Tensor, residuals: Tensor | None) -> bool:
    """Encode every slice of ``x``; see :meth:`Codec.encode_slices`. ValueError names what does not fit."""
    known, arguments, size = _known(codec, slices)
    _check("encode: x", x, DTYPES, x.device, slices.numel)
    _check("encode: out", out, BYTES, x.device, size)
    address = 0
    if residuals is not None:
        _check("encode: residual", residuals, (x.dtype,), x.device, codec.residual_numel_of(slices))
        address = residuals.data_ptr()
    function, last = _serving("encode_slices", x, slices.length, slices.width, known)
    if function is None:
        return False
    function(x.data_ptr(), address, DTYPES[x.dtype], *arguments, out.data_ptr(), last)
    return True


def decode_slices(codec: Codec, payloads: Tensor, slices: Slices, out: Tensor) -> bool:
    """Decode every slice of ``out``; see :meth:`Codec.decode_slices`. ValueError names what does not fit."""
    known, arguments, size = _known(codec, slices)
    _check("decode: out", out, DTYPES, out.device, slices.numel)
    _check("decode: payloads", payloads, BYTES, out.device, size)
    function, last = _serving("decode_slices", out, slices.length, slices.width, known)
    if function is None:
        return False
    function(payloads.data_ptr(), *arguments, out.data_ptr(), DTYPES[out.dtype], last)
    return True


def reduce_slices(
    codec: Codec,
    payloads: Sequence[Tensor],
    out: Tensor,
    width: int,
    gather: Codec | None,
    payload: Tensor | None,
    residual: Tensor | None,
) -> bool:
    """Sum ``payloads`` and encode the sum; see :meth:`Codec.reduce_slices`. ValueError names what does not fit."""
    numel, device = out.numel(), out.device
    known, size = _known_one(codec, numel, width)
    _check("decode_sum: out", out, DTYPES, device, numel)
    if not payloads:
        raise ValueError("decode_sum: no payloads found; give at least one.")
    _check_payloads(payloads, device, size)
    second, target, address = None, 0, 0
    if gather is not None and payload is not None:
        second, gather_size = _known_one(gather, numel, width)
        _check("reduce: payload", payload, BYTES, device, gather_size)
        target = payload.data_ptr()
        if second is None:
            return False
        if residual is not None:
            _check("reduce: residual", residual, (out.dtype,), device, gather.residual_numel(numel, width))
            address = residual.data_ptr()
    function, last = _serving("reduce_slices", out, numel, width, known, second)
    if function is None:
        return False
    addresses = [each.data_ptr() for each in payloads]
    function(addresses, known, width, numel, out.data_ptr(), DTYPES[out.dtype], second, target, address, last)
    return True


@lru_cache(4096)
def _known(codec: Codec, slices: Slices) -> tuple[Native | None, tuple[Any, ...], int]:
    """How the extension knows ``codec`` for these slices, the arguments that say so, and bytes of all payloads."""
    numel, width, length, world = slices
    known = codec.fitted(width).native
    return known, (known, width, numel, length, world, codec.wire_bytes(length, width)), codec.wire_bytes_of(slices)


@lru_cache(4096)
def _known_one(codec: Codec, numel: int, width: int) -> tuple[Native | None, int]:
    """How the extension knows ``codec`` for one payload of ``numel`` values, and its bytes."""
    return codec.fitted(width).native, codec.wire_bytes(numel, width)


def _check(name: str, found: Tensor, dtypes: Collection[torch.dtype], device: torch.device, length: int) -> None:
    """Refuse what an address cannot say."""
    if found.dtype not in dtypes:
        raise ValueError(f"{name} is {found.dtype}; expected {' or '.join(map(str, dtypes))}.")
    if found.dim() != 1 or not found.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(found.shape)}, strides {found.stride()}; expected contiguous 1-D.")
    if found.device != device:
        raise ValueError(f"{name} is on {found.device}; expected {device}, where the other tensor is.")
    if found.numel() != length:
        what = "bytes; the codec's payload has" if dtypes is BYTES else "numbers; expected"
        raise ValueError(f"{name} has {found.numel()} {what} {length}.")


def _check_payloads(payloads: Sequence[Tensor], device: torch.device, length: int) -> None:
    """The same of many, in one call."""
    for each in payloads:
        if each.numel() != length or each.dtype != torch.uint8 or each.device != device or not each.is_contiguous():
            _check("decode_sum: payload", each, BYTES, device, length)


def _serving(
    name: str, x: Tensor, numel: int, width: int, codec: Native | None, second: Native | None = None
) -> tuple[Callable[..., None] | None, int]:
    """The compiled function for the device of ``x``, or None, and its last argument: threads, or a CUDA stream."""
    if _extension is None or codec is None:
        return None, 0
    if x.is_cpu:
        return getattr(_extension, name), torch.get_num_threads()
    if not x.is_cuda:
        return None, 0
    for each in (codec, second):
        if each is not None and not has_cuda_kernel(each, x.dtype, numel, width):
            return None, 0
    function = getattr(_extension, name + "_cuda")
    if x.device.index == torch.cuda.current_device():
        return function, torch.cuda.current_stream().cuda_stream
    return _on_device(function, x.device), torch.cuda.current_stream(x.device).cuda_stream


def _on_device(function: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """``function`` with ``device`` current while it runs."""

    def call(*args: Any) -> None:
        with torch.cuda.device(device):
            function(*args)

    return call
