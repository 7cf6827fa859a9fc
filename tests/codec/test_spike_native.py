"""The compiled spike codec equals its definition bit for bit on every instruction set, whatever the tensor holds."""

from __future__ import annotations

import pytest
import torch
from codec_cases import DTYPES, KINDS, same, tensor

from flashcomm_megatron.codec import Spike, extension

pytestmark = pytest.mark.skipif(not extension.available(), reason=f"no compiled extension: {extension.reason()}")
ISAS = extension.info().get("isas", [])
FORMATS = [(bits, 64) for bits in range(2, 9)] + [(4, 32), (2, 128), (2, 8), (5, 24), (3, 256)]


@pytest.fixture(autouse=True)
def best_isa():
    """Whatever a test tried, go back to the best instruction set."""
    yield
    use(ISAS[0])


def use(isa: str) -> None:
    from flashcomm_megatron import _C

    _C.use_isa(isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "block"), FORMATS)
def test_compiled_equals_definition(bits: int, block: int, dtype: torch.dtype) -> None:
    codec, numel = Spike(bits, block), block * 19 + 5
    tensors = [tensor(kind, numel, dtype) for kind in KINDS]
    payloads = [codec.encode_ref(x) for x in tensors]
    sums = [*([payload] for payload in payloads), payloads[:3], payloads]
    expected = [codec.decode_sum_ref(chosen, numel, dtype) for chosen in sums]
    for isa in ISAS:
        use(isa)
        for x, payload in zip(tensors, payloads, strict=True):
            found = torch.full_like(payload, 0xAA)
            assert extension.encode(codec, x, found)
            assert torch.equal(found, payload), isa
        for chosen, total in zip(sums, expected, strict=True):
            out = torch.empty(numel, dtype=dtype)
            assert extension.decode_sum(codec, chosen, out)
            assert same(out, total), isa


@pytest.mark.parametrize("numel", [1, 2, 7, 9, 63, 64, 65])
def test_compiled_equals_definition_at_any_length(numel: int) -> None:
    codec, x = Spike(3, 64), tensor("normal", numel, torch.float32)
    payload = codec.encode(x)
    assert torch.equal(payload, codec.encode_ref(x))
    found = codec.decode_sum([payload], torch.empty(numel))
    assert torch.equal(found, codec.decode_sum_ref([payload], numel, torch.float32))


def test_threads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x = Spike(2, 64), torch.randn((3 << 18) + 77)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(codec.encode(x), codec.encode_ref(x))
    payload = codec.encode_ref(x)
    out = codec.decode_sum([payload, payload], torch.empty_like(x))
    assert torch.equal(out, codec.decode_sum_ref([payload, payload], x.numel(), x.dtype))
