"""The compiled extension ``flashcomm_megatron._C``, if it was built; the torch reference serves where it cannot.

``encode`` and ``decode_sum`` return False when the extension is missing or does not know the codec or the device;
the caller then runs its reference, whose results are the same bits. Shapes, dtypes, devices, contiguity and lengths
are checked here, before an address is handed over: the extension itself sees raw addresses only.

It knows a codec by the attribute ``native``, (format, bits, block), where ``format`` is the number of the codec's
family in csrc/api.h; a codec without one has no compiled form. ``FLASH_COMM_EXTENSION=0`` forces the reference.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Sequence
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Codec

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Dtype in csrc/api.h
INTERFACE = 6  # kInterface in csrc/api.h
BYTES = (torch.uint8,)


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
    """The extension, for what is not a codec: transport/streams.py."""
    return _extension


def cuda() -> ModuleType | None:
    """The extension if it has CUDA kernels: transport/workspace.py runs whole collectives with them."""
    return _extension if info().get("cuda") else None


@lru_cache
def has_cuda_kernel(native: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the extension codes tensors of ``dtype`` on GPUs for the codec known by ``native``."""
    kernels = cuda()
    return kernels is not None and bool(kernels.has_codec_cuda(DTYPES[dtype], *native))


def describe() -> str:
    """Which codec serves, in a phrase: "compiled codec (avx512; CUDA sm_80 sm_90 compute_90)"."""
    if _extension is None:
        return f"PyTorch codec ({_reason})"
    found = info()
    return f"compiled codec ({found['isa']}; {'CUDA ' + found['cuda'] if found['cuda'] else found['without_cuda']})"


def encode(codec: Codec, x: Tensor, out: Tensor, residual: Tensor | None = None) -> bool:
    """Encode x, of a dtype in DTYPES, into out, uint8 of the codec's wire bytes; ValueError names what does not fit.

    ``residual``, of the dtype of x: encode x + residual; the residual is replaced by the new rounding error.
    """
    if residual is not None:
        _check_residual(codec, x, residual)
    _check("encode: x", x, DTYPES, x.device)
    _check("encode: out", out, BYTES, x.device, codec.wire_bytes(x.numel()))
    address = 0 if residual is None else residual.data_ptr()
    return _call("encode", codec, x, (x.data_ptr(), DTYPES[x.dtype], x.numel()), (out.data_ptr(), address))


def _check_residual(codec: Codec, x: Tensor, residual: Tensor) -> None:
    expected = codec.residual_numel(x.numel())
    _check("encode: residual", residual, (x.dtype,), x.device)
    if residual.numel() != expected:
        raise ValueError(
            f"encode: residual has {residual.numel()} numbers; {codec} keeps {expected} of {x.numel()} values."
        )


def decode_sum(codec: Codec, payloads: Sequence[Tensor], out: Tensor) -> bool:
    """Write the sum of payloads, each uint8 of the codec's wire bytes, into out; ValueError names what does not fit."""
    _check("decode_sum: out", out, DTYPES, out.device)
    if not payloads:
        raise ValueError("decode_sum: no payloads found; give at least one.")
    length = codec.wire_bytes(out.numel())
    for payload in payloads:
        _check("decode_sum: payload", payload, BYTES, out.device, length)
    addresses = [payload.data_ptr() for payload in payloads]
    return _call("decode_sum", codec, out, (addresses, out.numel()), (out.data_ptr(), DTYPES[out.dtype]))


def _check(
    name: str, found: Tensor, dtypes: Collection[torch.dtype], device: torch.device, length: int | None = None
) -> None:
    """Refuse what an address cannot say."""
    if found.dtype not in dtypes:
        raise ValueError(f"{name} is {found.dtype}; expected {' or '.join(map(str, dtypes))}.")
    if found.dim() != 1 or not found.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(found.shape)}, strides {found.stride()}; expected contiguous 1-D.")
    if found.device != device:
        raise ValueError(f"{name} is on {found.device}; expected {device}, where the other tensor is.")
    if length is not None and found.numel() != length:
        raise ValueError(f"{name} has {found.numel()} bytes; the codec's payload has {length}.")


def _call(name: str, codec: Codec, where: Tensor, before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Run the compiled function for ``where``'s device, if there is one for this codec."""
    native = codec.native
    if _extension is None or native is None:
        return False
    if where.device.type == "cpu":
        getattr(_extension, name)(*before, *native, *after, torch.get_num_threads())
        return True
    if where.device.type != "cuda" or not has_cuda_kernel(native, where.dtype):
        return False
    function = getattr(_extension, name + "_cuda")
    with torch.cuda.device(where.device):
        function(*before, *native, *after, torch.cuda.current_stream().cuda_stream)
    return True
