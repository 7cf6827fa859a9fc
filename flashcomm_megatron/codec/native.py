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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Codec, Slices

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Dtype in csrc/api.h
INTERFACE = 9  # kInterface in csrc/api.h
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


class Received(NamedTuple):
    """One payload of each rank, as an exchange left them: rank r's at ``r * size`` of ``inbox``.

    This rank's own was never sent: it may still be at ``start`` of the ``outbox`` where it was encoded.
    """

    inbox: Tensor
    size: int
    world: int
    rank: int = 0
    outbox: Tensor | None = None
    start: int = 0

    def payloads(self) -> list[Tensor]:
        """A view of each."""
        found = list(self.inbox[: self.world * self.size].view(self.world, self.size).unbind())
        if self.outbox is not None:
            found[self.rank] = self.outbox[self.start : self.start + self.size]
        return found


def encode_slices(codec: Codec, x: Tensor, slices: Slices, out: Tensor, residuals: Tensor | None) -> bool:
    """Encode every slice of ``x``; see :meth:`Codec.encode_slices`. ValueError names what does not fit."""
    layout = codec.layouts.get(slices) or _layout(codec, slices)
    if x.numel() != slices.numel or x.dtype not in DTYPES or not x.is_contiguous():
        raise _misfit("encode: x", x, DTYPES, x.device, slices.numel)
    if not _is_payload(out, layout.size, x.device):
        raise _misfit("encode: out", out, BYTES, x.device, layout.size)
    address = 0
    if residuals is not None:
        address = _residual("encode: residual", residuals, x, codec.residual_numel_of(slices))
    function, last = _serving("encode_slices", x, layout)
    if function is None:
        return False
    function(x.data_ptr(), address, DTYPES[x.dtype], *layout.arguments, out.data_ptr(), last)
    return True


def decode_slices(codec: Codec, payloads: Tensor, slices: Slices, out: Tensor) -> bool:
    """Decode every slice of ``out``; see :meth:`Codec.decode_slices`. ValueError names what does not fit."""
    layout = codec.layouts.get(slices) or _layout(codec, slices)
    if out.numel() != slices.numel or out.dtype not in DTYPES or not out.is_contiguous():
        raise _misfit("decode: out", out, DTYPES, out.device, slices.numel)
    if not _is_payload(payloads, layout.size, out.device):
        raise _misfit("decode: payloads", payloads, BYTES, out.device, layout.size)
    function, last = _serving("decode_slices", out, layout)
    if function is None:
        return False
    function(payloads.data_ptr(), *layout.arguments, out.data_ptr(), DTYPES[out.dtype], last)
    return True


def reduce_slices(
    codec: Codec,
    payloads: Sequence[Tensor] | Received,
    out: Tensor,
    width: int,
    gather: Codec | None,
    payload: Tensor | None,
    residual: Tensor | None,
    part: tuple[int, int] | None = None,
) -> bool:
    """Sum ``payloads`` and encode the sum; see :meth:`Codec.reduce_slices`. ValueError names what does not fit."""
    first, end = part or (0, out.numel())
    numel, dtype = end - first, out.dtype
    whole = numel, width, numel, 1
    layout = codec.layouts.get(whole) or _layout(codec, whole)
    if not 0 <= first <= end <= out.numel() or dtype not in DTYPES or not out.is_contiguous():
        raise _misfit("decode_sum: out", out, DTYPES, out.device, end)
    addresses = _addresses(payloads, out, layout.size)
    second, target, address = None, 0, 0
    if gather is not None and payload is not None:
        second = gather.layouts.get(whole) or _layout(gather, whole)
        if not _is_payload(payload, second.size, out.device):
            raise _misfit("reduce: payload", payload, BYTES, out.device, second.size)
        target = payload.data_ptr()
        if residual is not None:
            address = _residual("reduce: residual", residual, out, gather.residual_numel(numel, width))
    function, last = _serving("reduce_slices", out, layout, second)
    if function is None:
        return False
    native, address_of_out = layout.arguments[0], out.data_ptr() + first * out.itemsize
    further = (second and second.arguments[0], target, address, last)
    function(addresses, native, width, numel, address_of_out, DTYPES[dtype], *further)
    return True


class Layout(NamedTuple):
    """Slices of a tensor as the extension knows them, of one codec."""

    arguments: tuple[Any, ...]  # codec or None, width, numel, length, world, stride
    size: int  # bytes of all payloads


def _layout(codec: Codec, slices: tuple[int, ...]) -> Layout:
    """How the extension knows ``slices`` (numel, width, length, world); looked up where it was asked for before."""
    numel, width, length, world = slices
    native, stride = codec.fitted(width).native, codec.wire_bytes(length, width)
    found = Layout((native, width, numel, length, world, stride), codec.wire_bytes_of(slices))
    if len(codec.layouts) >= 4096:
        codec.layouts.clear()
    codec.layouts[slices] = found
    return found


def _is_payload(x: Tensor, size: int, device: torch.device) -> bool:
    """Whether ``x`` is contiguous bytes on ``device``, at least ``size`` of them."""
    return x.numel() >= size and x.dtype is torch.uint8 and x.device == device and x.is_contiguous()


def _misfit(name: str, found: Tensor, dtypes: Collection[torch.dtype], device: torch.device, length: int) -> ValueError:
    """The error of what an address cannot say."""
    if found.dtype not in dtypes:
        return ValueError(f"{name} is {found.dtype}; expected {' or '.join(map(str, dtypes))}.")
    if not found.is_contiguous():
        return ValueError(f"{name} has shape {tuple(found.shape)}, strides {found.stride()}; expected contiguous.")
    if found.device != device:
        return ValueError(f"{name} is on {found.device}; expected {device}, where the other tensor is.")
    what = "bytes; the codec's payload has" if dtypes is BYTES else "numbers; expected"
    return ValueError(f"{name} has {found.numel()} {what} {length}.")


def _residual(name: str, found: Tensor, x: Tensor, length: int) -> int:
    """The address of the residual of ``x``."""
    fits = found.numel() == length and found.is_contiguous()
    if not fits or found.dtype != x.dtype or found.device != x.device:
        raise _misfit(name, found, (x.dtype,), x.device, length)
    return found.data_ptr()


def _addresses(payloads: Sequence[Tensor] | Received, out: Tensor, size: int) -> list[int]:
    """Where payloads of ``size`` bytes begin; of those that an exchange left in one tensor, without a view of each."""
    if not isinstance(payloads, Received):
        if not payloads:
            raise ValueError("decode_sum: no payloads found; give at least one.")
        for each in payloads:
            if each.numel() != size or not _is_payload(each, size, out.device):
                raise _misfit("decode_sum: payload", each, BYTES, out.device, size)
        return [each.data_ptr() for each in payloads]
    inbox, _, world, rank, outbox, start = payloads
    if not _is_payload(inbox, size * world, out.device):
        raise _misfit("decode_sum: payloads", inbox, BYTES, out.device, size * world)
    first = inbox.data_ptr()
    addresses = list(range(first, first + size * world, size))
    if outbox is not None:
        if not _is_payload(outbox, start + size, out.device):
            raise _misfit("decode_sum: own payload", outbox, BYTES, out.device, start + size)
        addresses[rank] = outbox.data_ptr() + start
    return addresses


def _serving(
    name: str, x: Tensor, layout: Layout, second: Layout | None = None
) -> tuple[Callable[..., None] | None, int]:
    """The compiled function for the device of ``x``, or None, and its last argument: threads, or a CUDA stream."""
    codec, width, _, length = layout.arguments[:4]
    codecs = (codec,) if second is None else (codec, second.arguments[0])
    if _extension is None or None in codecs:
        return None, 0
    if x.is_cpu:
        return getattr(_extension, name), torch.get_num_threads()
    if not x.is_cuda or not all(has_cuda_kernel(each, x.dtype, length, width) for each in codecs):
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
