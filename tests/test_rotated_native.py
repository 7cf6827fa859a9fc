"""The compiled rotated codec equals its definition bit for bit, residuals included, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch

from flashcomm_megatron import extension
from flashcomm_megatron.codec import residual
from flashcomm_megatron.codec.rotated import LEVELS, Rotated

pytestmark = pytest.mark.skipif(not extension.available(), reason=f"no compiled extension: {extension.reason()}")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=extension.info().get("isas", ["none"]))
def isa(request):
    """Run the test on one instruction set and go back to the best."""
    from flashcomm_megatron import _C

    before = extension.info()["isa"]
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


def kinds(numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of every temper: outliers, one-sided, constants, tiny, huge, signed zeros, wide range, NaN, Inf."""
    torch.manual_seed(numel)
    x = torch.randn(numel)
    x[::7] *= 50
    huge = 6e4 if dtype == torch.float16 else 3e38
    found = [x, x.abs() + 3, torch.full((numel,), 0.1), x * 1e-38, (torch.rand(numel) - 0.5) * huge]
    found += [torch.zeros(numel) * -1, x * torch.rand(numel).mul(40).exp2()]
    for bad in (math.nan, -math.inf):
        broken = x.clone()
        broken[: numel // 3] = 5.5
        broken[numel // 2] = bad
        found.append(broken)
    return [each.to(dtype) for each in found]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits; any NaN equals any other."""
    if found.is_floating_point():
        found, expected = (torch.where(each.isnan(), 7.0, each) for each in (found, expected))
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


FORMATS = [(bits, 32) for bits in LEVELS] + [(4.5, 16), (5, 64), (2.5, 256), (8, 1024)]


@pytest.mark.parametrize(("bits", "block"), FORMATS)
def test_compiled_equals_definition(isa, bits, block):
    codec = Rotated(bits, block)
    for numel in (1, block * 33 + 5):
        for dtype in DTYPES:
            payloads = []
            for x in kinds(numel, dtype):
                payloads.append(torch.full((codec.wire_bytes(numel),), 0xAA, dtype=torch.uint8))
                assert extension.encode(codec, x, payloads[-1])
                assert same(payloads[-1], codec.encode_ref(x))
            for chosen in (payloads[:1], payloads[3:5], payloads[4:5], payloads[2:3], payloads):
                out = torch.empty(numel, dtype=dtype)
                assert extension.decode_sum(codec, chosen, out)
                assert same(out, codec.decode_sum_ref(chosen, numel, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_equal_definition(isa, dtype, monkeypatch):
    codec, numel = Rotated(4.5, 32), 5000
    for x in kinds(numel, dtype):
        before = (torch.randn(numel) * 0.01).to(dtype)
        compiled, defined = before.clone(), before.clone()
        payload = torch.empty(codec.wire_bytes(numel), dtype=torch.uint8)
        assert extension.encode_residual(codec, x, compiled, payload)
        with monkeypatch.context() as patch:
            patch.setattr(extension, "_extension", None)
            assert same(payload, residual.encode(codec, x, defined))
        assert same(compiled, defined)


def test_threads_do_not_change_the_result(monkeypatch):
    codec, x = Rotated(4.5, 32), torch.randn(3 << 18)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert same(codec.encode(x), codec.encode_ref(x))
        payload = codec.encode_ref(x)
        out = codec.decode_sum([payload, payload], torch.empty_like(x))
        assert same(out, codec.decode_sum_ref([payload, payload], x.numel(), x.dtype))


def test_wrong_residuals_are_refused():
    codec, x = Rotated(4, 32), torch.randn(64)
    out = torch.empty(codec.wire_bytes(64), dtype=torch.uint8)
    with pytest.raises(ValueError, match="residual has 63 values; x has 64"):
        extension.encode_residual(codec, x, torch.zeros(63), out)
    with pytest.raises(ValueError, match=r"residual is torch\.float16"):
        extension.encode_residual(codec, x, torch.zeros(64, dtype=torch.float16), out)
