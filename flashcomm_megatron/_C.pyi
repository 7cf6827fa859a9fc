"""The compiled extension, csrc/bindings.cpp. Addresses are integers and nothing is checked; use extension.py."""

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
def encode(
    x: int, dtype: int, numel: int, format: int, bits: int, block: int, payload: int, residual: int, threads: int
) -> None: ...
def decode_sum(
    payloads: Sequence[int], numel: int, format: int, bits: int, block: int, out: int, dtype: int, threads: int
) -> None: ...

# In builds with nvcc:

def encode_cuda(
    x: int, dtype: int, numel: int, format: int, bits: int, block: int, payload: int, stream: int
) -> None: ...
def decode_sum_cuda(
    payloads: Sequence[int], numel: int, format: int, bits: int, block: int, out: int, dtype: int, stream: int
) -> None: ...
