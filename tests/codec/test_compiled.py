"""Compiled codecs of rotated blocks and of spikes equal their definitions bit for bit, on every instruction set.

Residuals included, and whatever the tensor holds. Uniform blocks: test_codec.py.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from codec_cases import DTYPES, KINDS, native_decode_sum, native_encode, same, tensor
from specification import fading
from torch import Tensor

from flashcomm_megatron.codec import Codec, Rotated, Spike, rotated
from flashcomm_megatron.codec import native as compiled
from flashcomm_megatron.codec.rotated import LEVELS

pytestmark = pytest.mark.skipif(not compiled.available(), reason=f"no compiled extension: {compiled.reason()}")
SPIKES = [Spike(bits, 64) for bits in range(2, 9)] + [Spike(4, 32), Spike(2, 128), Spike(2, 8), Spike(5, 24)]
ROTATED = [Rotated(bits, 32) for bits in LEVELS] + [Rotated(4.5, 16), Rotated(5, 64), Rotated(2.5, 256)]
FORMATS = [*SPIKES, Spike(3, 256), *ROTATED, Rotated(8, 1024)]


def tensors(numel: int, dtype: torch.dtype) -> list[Tensor]:
    """Of every kind; zeros in blocks of which one is negative; zeros of whole families, some of which end in them."""
    found = [tensor(kind, numel, dtype) for kind in KINDS]
    signed, masked = found[0].clone(), found[0].clone()
    signed[:256] = 0
    signed[:1] = signed[64 + 5 : 64 + 6] = -0.0
    masked[numel // 8 : numel - numel // 8] = 0
    return [*found, signed, masked]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", FORMATS, ids=str)
def test_compiled_equals_definition(native: ModuleType, codec: Codec, dtype: torch.dtype) -> None:
    for numel in (codec.block * 33 + 5, codec.block * 35):  # the latter ends within a super-block, on a whole block
        given = tensors(numel, dtype)
        payloads = [codec.encode_ref(x) for x in given]
        by_kind = dict(zip(KINDS, payloads, strict=False))
        by_kind.pop("saturating")  # beyond 2**127 a sum of several may be Inf by one and not by the other
        several, zeros = [*by_kind.values(), *payloads[-2:]], by_kind["signed_zeros"]
        alone = [[payload] for payload in payloads]
        sums = alone if numel % codec.block else [several[:3], several[3:5], [zeros, zeros], several]
        expected = [codec.decode_sum_ref(chosen, numel, dtype) for chosen in sums]
        for isa in native.info()["isas"]:
            native.use_isa(isa)
            for x, payload in zip(given, payloads, strict=True):
                found = torch.full_like(payload, 0xAA)
                assert native_encode(codec, x, found)
                assert torch.equal(found, payload), isa
            for chosen, total in zip(sums, expected, strict=True):
                out = torch.empty(numel, dtype=dtype)
                assert native_decode_sum(codec, chosen, out)
                assert same(out, total), isa


@pytest.mark.parametrize("codec", [Spike(3, 64), Rotated(4.5, 32)], ids=str)
def test_compiled_equals_definition_at_any_length(codec: Codec) -> None:
    for numel in (1, 2, 7, 9, 63, 64, 65):
        x = tensor("normal", numel, torch.float32)
        payload = codec.encode(x)
        assert torch.equal(payload, codec.encode_ref(x))
        found = codec.decode_sum([payload], torch.empty(numel))
        assert torch.equal(found, codec.decode_sum_ref([payload], numel, torch.float32))


# ---- residuals -------------------------------------------------------------------------------------------------------


def coefficients_of(codec: Rotated, numel: int, dtype: torch.dtype) -> Tensor:
    """A residual of normal numbers, some of them the smallest there are; zeros for blocks that are not there."""
    numbers = (
        torch.randn(math.ceil(numel / codec.block), codec.block, generator=torch.Generator().manual_seed(1)) * 0.05
    )
    numbers[:, 3::17] = 2.0**-126
    return rotated._grouped(numbers, dtype, len(numbers))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", [Rotated(4.5, 32), Rotated(5, 64), Rotated(8, 16), Rotated(2, 32)], ids=str)
def test_residuals_equal_definition(native: ModuleType, codec: Rotated, dtype: torch.dtype) -> None:
    numel = 2500
    *others, masked = tensors(numel, dtype)
    denormal = others[0] * 2.0**-115  # coefficients that are denormal where they are small
    for x in (*others, masked, denormal):
        before = coefficients_of(codec, numel, dtype)
        before[numel // 8 : numel - numel // 8] *= 0 if x is masked else 1
        before *= 2.0**-115 if x is denormal else 1
        defined = before.clone()
        expected = [codec.encode_residual_ref(x, defined) for _ in range(2)]
        for isa in native.info()["isas"]:
            native.use_isa(isa)
            mine = before.clone()
            for payload in expected:
                assert torch.equal(codec.encode(x, residual=mine), payload), isa
            assert same(mine, defined), isa


@pytest.mark.parametrize("codec", [Rotated(3, 16), Rotated(4.5, 32), Rotated(5, 64)], ids=str)
def test_residuals_keep_the_sign_of_zero(native: ModuleType, codec: Rotated) -> None:
    defined = torch.zeros(codec.residual_numel(3001), dtype=torch.float16)
    kept = {isa: defined.clone() for isa in native.info()["isas"]}
    for x in fading(3001):
        expected = codec.encode_residual_ref(x, defined)
        for isa, residual in kept.items():
            native.use_isa(isa)
            assert torch.equal(codec.encode(x, residual=residual), expected), isa
            assert same(residual, defined), isa


def test_residuals_of_a_wrong_size_are_refused() -> None:
    codec, x = Rotated(4, 32), torch.randn(64)
    with pytest.raises(ValueError, match=r"residual has 64 numbers; expected 128"):
        codec.encode(x, residual=torch.zeros(64))
    with pytest.raises(ValueError, match=r"residual is torch\.float16"):
        codec.encode(x, residual=torch.zeros(128, dtype=torch.float16))
