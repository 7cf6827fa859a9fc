"""Tensors a codec must survive, by name, and equality of bits that treats one NaN as any other."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flashcomm_megatron.codec import Codec, Slices, native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def words(x: Tensor) -> Tensor:
    """Bit patterns of a floating tensor, every NaN replaced by zero bits; NaNs compare by position, see ``same``."""
    integer = {4: torch.int32, 2: torch.int16}[x.element_size()]
    return torch.where(x.isnan(), 0, x.view(integer))


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit; which NaN stands for NaN is the machine's choice in torch."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(words(found), words(expected))


def normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator)


def one_sided(n: int, generator: torch.Generator) -> Tensor:
    """Far from zero: what a clamped zero point gets wrong."""
    return 100 + torch.rand(n, generator=generator)


def constants(n: int, generator: torch.Generator) -> Tensor:
    """Runs of 128 equal values, which most dtypes and all of bfloat16 cannot hold."""
    return torch.randn(math.ceil(n / 128), generator=generator).repeat_interleave(128)[:n]


def denormals(n: int, generator: torch.Generator) -> Tensor:
    """Around the smallest numbers of every dtype; 2**-24 is float16's, 2**-133 bfloat16's."""
    scale = torch.tensor([2.0**-24, 2.0**-133, 2.0**-149])[torch.randint(3, (n,), generator=generator)]
    return scale * torch.randint(-20, 21, (n,), generator=generator)


def tiny(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator) * 2.0**-120


def signed_zeros(n: int, generator: torch.Generator) -> Tensor:
    return torch.where(torch.rand(n, generator=generator) < 0.5, -0.0, 0.0)


def zeros_in_runs(n: int, generator: torch.Generator) -> Tensor:
    """Blocks of nothing but -0, or nothing but 0."""
    return torch.where(torch.rand(math.ceil(n / 512), generator=generator) < 0.5, -0.0, 0.0).repeat_interleave(512)[:n]


def huge(n: int, generator: torch.Generator) -> Tensor:
    """Ranges whose width overflows, up to float32's largest number, which bfloat16 cannot hold."""
    largest = torch.tensor([3.4028234663852886e38, 3.39e38, 6.5504e4])[torch.randint(3, (n,), generator=generator)]
    return largest * (2 * torch.rand(n, generator=generator) - 1).sign() * torch.rand(n, generator=generator).round()


def saturating(n: int, generator: torch.Generator) -> Tensor:
    """A narrow range around bfloat16's lowest number, which float32 goes below."""
    return -3.38e38 - 2.2e36 * torch.rand(n, generator=generator)


def strange(n: int, generator: torch.Generator) -> Tensor:
    """Some NaN and Inf among the values, the rest of the blocks ordinary."""
    x = torch.randn(n, generator=generator)
    rare = torch.rand(n, generator=generator)
    x[rare < 0.006] = math.nan
    x[(rare > 0.006) & (rare < 0.009)] = math.inf
    x[(rare > 0.009) & (rare < 0.012)] = -math.inf
    return x


def outlier(n: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(n, generator=generator)
    x[n // 2 : n // 2 + 1] = 6e4
    return x


def overflowing(n: int, generator: torch.Generator) -> Tensor:
    """Of every 32 values one or all around half of what float16 holds: sums of two may be Inf, or hide it."""
    x = 800 * torch.randn(n, generator=generator)
    sizes = 16000 + 18000 * torch.rand(n // 32, generator=generator)
    for number, (block, size) in enumerate(zip(x[: n // 32 * 32].view(-1, 32), sizes, strict=True)):
        block[slice(number, number + 1) if number % 3 and number < 32 else slice(32)] += size
    return x


def patterns(n: int, generator: torch.Generator) -> Tensor:
    """Any bits at all, seen as float32."""
    return torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32).view(torch.float32)


def octaves(n: int, generator: torch.Generator) -> Tensor:
    """Blocks of every magnitude."""
    exponents = torch.randint(-149, 128, (math.ceil(n / 32),), generator=generator).repeat_interleave(32)[:n]
    return torch.ldexp(torch.randn(n, generator=generator), exponents).clamp(-3.4e38, 3.4e38)


KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    function.__name__: function
    for function in (
        normal, one_sided, constants, denormals, tiny, signed_zeros, zeros_in_runs, huge, saturating, strange, outlier,
        overflowing,        patterns, octaves,
    )
}  # fmt: skip


def tensor(kind: str, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """n values of a kind."""
    return KINDS[kind](n, torch.Generator().manual_seed(seed)).to(dtype)


def native_encode(codec: Codec, x: Tensor, out: Tensor) -> bool:
    """Whether the compiled codec encoded a tensor of one row."""
    return native.encode_slices(codec, x, Slices(x.numel(), x.numel(), x.numel(), 1), out, None)


def native_decode_sum(codec: Codec, payloads: list[Tensor], out: Tensor) -> bool:
    """Whether the compiled codec decoded and summed payloads of tensors of one row."""
    return native.reduce_slices(codec, payloads, out, out.numel(), None, None, None)
