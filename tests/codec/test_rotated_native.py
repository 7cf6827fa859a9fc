"""The compiled rotated codec equals its definition bit for bit, residuals included, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from codec_cases import native_decode_sum, native_encode
from specification import fading

from flashcomm_megatron.codec import native as compiled
from flashcomm_megatron.codec import rotated
from flashcomm_megatron.codec.rotated import LEVELS, Rotated

pytestmark = pytest.mark.skipif(not compiled.available(), reason=f"no compiled extension: {compiled.reason()}")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


ISAS = compiled.info().get("isas", [])


@pytest.fixture(autouse=True)
def best_isa():
    """Whatever a test tried, go back to the best instruction set."""
    yield
    use(ISAS[0])


def use(isa: str) -> None:
    from flashcomm_megatron import _C

    _C.use_isa(isa)


def kinds(numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of every temper: outliers, one-sided, constants, tiny, huge, signed zeros, wide range, NaN, Inf."""
    torch.manual_seed(numel)
    x = torch.randn(numel)
    x[::7] *= 50
    huge = 6e4 if dtype == torch.float16 else 3e38
    found = [x, x.abs() + 3, torch.full((numel,), 0.1), x * 1e-38, (torch.rand(numel) - 0.5) * huge]
    found += [torch.zeros(numel), torch.zeros(numel) * -1, x * torch.rand(numel).mul(40).exp2()]
    for bad in (math.nan, -math.inf):
        broken = x.clone()
        broken[: numel // 3] = 5.5
        broken[numel // 2] = bad
        found.append(broken)
    masked = x.clone()
    masked[numel // 8 : numel - numel // 8] = 0  # families of nothing but zeros, and such that end in some
    signed = x.clone()
    signed[:256] = 0  # blocks of zeros, one of which is negative, among others
    signed[0] = signed[64 + 5 : 64 + 6] = -0.0
    return [each.to(dtype) for each in (*found, signed, masked)]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits; any NaN equals any other."""
    if found.is_floating_point():
        found, expected = (torch.where(each.isnan(), 7.0, each) for each in (found, expected))
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


FORMATS = [(bits, 32) for bits in LEVELS] + [(4.5, 16), (5, 64), (2.5, 256), (8, 1024)]


@pytest.mark.parametrize(("bits", "block"), FORMATS)
def test_compiled_equals_definition(bits, block):
    codec = Rotated(bits, block)
    for numel in (1, block * 33 + 5, block * 35):  # the last one ends within a super-block, on a whole block
        for dtype in DTYPES[: 1 if numel == 1 else None]:
            tensors = kinds(numel, dtype)
            payloads = [codec.encode_ref(x) for x in tensors]
            plain, zeros = [payloads[0], payloads[1], payloads[7]], [payloads[5]] * 2
            for chosen in (payloads[:1], plain, payloads[3:5], payloads[4:5], payloads[2:3], zeros, payloads):
                expected = codec.decode_sum_ref(chosen, numel, dtype)
                for isa in ISAS:
                    use(isa)
                    out = torch.empty(numel, dtype=dtype)
                    assert native_decode_sum(codec, chosen, out)
                    assert same(out, expected), isa
            for isa in ISAS:
                use(isa)
                for x, expected in zip(tensors, payloads, strict=True):
                    found = torch.full((codec.wire_bytes(numel),), 0xAA, dtype=torch.uint8)
                    assert native_encode(codec, x, found)
                    assert same(found, expected), isa


def coefficients_of(codec: Rotated, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A residual of normal numbers, some of them the smallest there are; zeros for blocks that are not there."""
    numbers = torch.randn(math.ceil(numel / codec.block), codec.block) * 0.05
    numbers[:, 3::17] = 2.0**-126
    return rotated._grouped(numbers, dtype, len(numbers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", [Rotated(4.5, 32), Rotated(5, 64), Rotated(8, 16), Rotated(2, 32)], ids=str)
def test_residuals_equal_definition(dtype, codec, monkeypatch):
    numel = 2500
    *others, masked = kinds(numel, dtype)
    denormal = others[0] * 2.0**-115  # coefficients that are denormal where they are small
    for x in (*others, masked, denormal):
        before = coefficients_of(codec, numel, dtype)
        before[numel // 8 : numel - numel // 8] *= 0 if x is masked else 1
        before *= 2.0**-115 if x is denormal else 1
        defined = before.clone()
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "_extension", None)
            expected = [codec.encode(each, residual=defined) for each in (x, x)]
        for isa in ISAS:
            use(isa)
            mine = before.clone()
            for payload in expected:
                assert same(codec.encode(x, residual=mine), payload), isa
            assert same(mine, defined), isa


@pytest.mark.parametrize("codec", [Rotated(3, 16), Rotated(4.5, 32), Rotated(5, 64)], ids=str)
def test_residuals_keep_the_sign_of_zero(codec):
    defined = torch.zeros(codec.residual_numel(3001), dtype=torch.float16)
    kept = {isa: defined.clone() for isa in ISAS}
    for x in fading(3001):
        expected = codec.encode_residual_ref(x, defined)
        for isa, residual in kept.items():
            use(isa)
            assert same(codec.encode(x, residual=residual), expected), isa
            assert same(residual, defined), isa


def test_threads_do_not_change_the_result(monkeypatch):
    codec, x = Rotated(4.5, 32), torch.randn(3 << 18)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert same(codec.encode(x), codec.encode_ref(x))
        payload = codec.encode_ref(x)
        out = codec.decode_sum([payload, payload], torch.empty_like(x))
        assert same(out, codec.decode_sum_ref([payload, payload], x.numel(), x.dtype))


def test_residuals_of_a_wrong_size_are_refused():
    codec, x = Rotated(4, 32), torch.randn(64)
    with pytest.raises(ValueError, match=r"residual has 64 numbers; expected 128"):
        codec.encode(x, residual=torch.zeros(64))
    with pytest.raises(ValueError, match=r"residual is torch\.float16"):
        codec.encode(x, residual=torch.zeros(128, dtype=torch.float16))
