"""Stochastic rounding: the hash's definition, no bias, the same tensor always alike, NaN and Inf, ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashcomm_megatron.codec import Rotated, Spike, Stochastic, Uniform
from flashcomm_megatron.codec.stochastic import uniform

CODECS = [Uniform(2, 64), Uniform(4, 32), Uniform(8, 128), Rotated(2, 32), Rotated(4.5, 32), Rotated(8, 64)]
MASK = 0xFFFFFFFF

codecs = pytest.mark.parametrize("codec", CODECS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def hashed(v: int) -> int:
    v ^= v >> 16
    v = v * 0x7FEB352D & MASK
    v ^= v >> 15
    v = v * 0x846CA68B & MASK
    return v ^ v >> 16


def roundtrip(codec: Uniform | Rotated | Stochastic, x: Tensor) -> Tensor:
    return codec.decode_sum([codec.encode(x)], torch.empty(x.numel(), dtype=torch.float32))


def draw(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()).to(dtype)


@dtypes
def test_the_hash_is_the_documented_one(dtype: torch.dtype) -> None:
    x = draw(37, 1, dtype)
    integers = x.view(torch.int32 if dtype == torch.float32 else torch.int16).tolist()
    checksum = sum(hashed((bits + 0x9E3779B9 * i) & MASK) for i, bits in enumerate(integers)) & MASK
    expected = [(hashed(checksum ^ hashed(i)) >> 16) / 2**16 for i in range(64)]
    assert uniform(x, 32).flatten().tolist() == expected


def test_the_dither_is_uniform_and_new_for_every_tensor() -> None:
    x = draw(2**16, 2)
    u = uniform(x, 32).flatten().double()
    changed = x.clone()
    changed[12345] += 1.0
    v = uniform(changed, 32).flatten().double()
    deviations = 6 / math.sqrt(x.numel())  # six standard deviations of a mean over all values
    assert abs(u.mean() - 0.5) < deviations * math.sqrt(1 / 12)
    assert abs((u * v).mean() - 0.25) < deviations * math.sqrt(1 / 9 - 1 / 16)
    assert abs((u[1:] * u[:-1]).mean() - 0.25) < deviations * math.sqrt(1 / 9 - 1 / 16)
    assert abs((u < 1 / 16).double().mean() - 1 / 16) < deviations * math.sqrt(15 / 256)


@codecs
@dtypes
def test_same_tensor_same_bits(codec: Uniform | Rotated, dtype: torch.dtype) -> None:
    x, stochastic = draw(1000, 3, dtype), Stochastic(codec)
    first = stochastic.encode(x)
    draw(1000, 4)
    assert torch.equal(first, stochastic.encode(x.clone()))
    assert first.numel() == stochastic.wire_bytes(1000) == codec.wire_bytes(1000)
    assert not torch.equal(first, codec.encode(x))


@codecs
def test_the_mean_of_many_roundings_is_the_value(codec: Uniform | Rotated) -> None:
    """Every tensor has the same 32 blocks and, in a block of its own, a number that gives it another dither."""
    many, stochastic = 400, Stochastic(codec)
    x = draw(32 * codec.block, 5)
    number = torch.zeros(codec.block)
    errors = torch.zeros(many, x.numel(), dtype=torch.float64)
    for i in range(many):
        number[0] = 1e-3 * i
        errors[i] = (roundtrip(stochastic, torch.cat([x, number]))[: x.numel()] - x).double()
    blocks = errors.view(many, 32, codec.block)
    deviation = blocks.square().mean((0, 2)).sqrt()  # of one rounding, by block
    bias = blocks.mean(0) / deviation[:, None] * math.sqrt(many)  # in standard deviations of a mean of many
    assert bias.abs().max() < 8  # one value's variance is at most 3/2 of its block's: six and a half of its own
    assert abs(bias.square().mean() - 1) < 6 * math.sqrt(3 / x.numel())
    assert abs(bias.mean()) < 6 / math.sqrt(x.numel())
    nearest = (roundtrip(codec, x) - x).double()
    assert nearest.square().mean() > 50 * errors.mean(0).square().mean()


@codecs
def test_ends_of_the_range_are_reached_and_not_passed(codec: Uniform | Rotated) -> None:
    for seed in range(20):
        x = draw(codec.block, seed).clamp(-1, 1)
        x[0], x[1] = -1.0, 1.0
        error = (roundtrip(Stochastic(codec), x) - x).abs().max()
        levels = codec.levels if isinstance(codec, Uniform) else codec.levels // 2 - 1
        # Uniform: one step of at most 2 / levels; Rotated: one step of each of the block's coefficients.
        worst = 2.1 / levels if isinstance(codec, Uniform) else 1.13 * codec.block / levels
        assert error <= worst


@codecs
def test_nan_inf_constants_and_nothing(codec: Uniform | Rotated) -> None:
    stochastic = Stochastic(codec)
    x = draw(4 * codec.block, 6)
    x[0], x[codec.block + 1] = math.nan, math.inf
    x[2 * codec.block : 3 * codec.block] = 0.1
    found = roundtrip(stochastic, x).view(4, codec.block)
    assert found[:2].isnan().all() and (found[2] == torch.tensor(0.1)).all() and found[3].isfinite().all()
    assert stochastic.encode(torch.empty(0)).numel() == 0


def test_a_format_that_rounds_to_nearest_is_refused() -> None:
    with pytest.raises(ValueError, match="format spike rounds to nearest; choose recipe auto, flash-v1"):
        Stochastic(Spike(4, 64))
