"""The compiled extension, csrc/bindings.cpp. Addresses are integers and nothing is checked; use native.py."""

from collections.abc import Sequence
from typing import TypedDict

class Info(TypedDict):
    isas: list[str]  # instruction sets this machine can run, best first
    isa: str  # the one in use
    formats: int  # codec families known
    cuda: str  # GPU architectures compiled in, "" if none
    without_cuda: str  # why there are none

def info() -> Info: ...
def use_isa(name: str) -> bool: ...

# A codec is (format, bits, block); csrc/api.h says what the arguments mean.

def encode_slices(
    x: int,
    residual: int,
    dtype: int,
    codec: tuple[int, int, int],
    width: int,
    numel: int,
    length: int,
    count: int,
    stride: int,
    payloads: int,
    threads: int,
) -> None: ...
def reduce_slices(
    payloads: Sequence[int],
    codec: tuple[int, int, int],
    width: int,
    numel: int,
    out: int,
    dtype: int,
    gather: tuple[int, int, int] | None,
    payload: int,
    residual: int,
    threads: int,
) -> None: ...
def decode_slices(
    payloads: int,
    codec: tuple[int, int, int],
    width: int,
    numel: int,
    length: int,
    count: int,
    stride: int,
    x: int,
    dtype: int,
    threads: int,
) -> None: ...

# In builds with nvcc: encode_slices_cuda, reduce_slices_cuda and decode_slices_cuda are the same on the current device,
# with a stream in the place of threads.

def has_codec_cuda(dtype: int, format: int, bits: int, block: int, numel: int = 1, width: int = 0) -> bool: ...
