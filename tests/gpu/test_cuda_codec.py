"""The codec kernels on a GPU: bit for bit what the definition says, for every width, number type and kind of block."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from specification import same, strange

from flashcomm_megatron.codec import Rotated, Spike, Uniform, extension
from flashcomm_megatron.codec.rotated import LEVELS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(extension.cuda() is None, reason=f"no CUDA kernels: {extension.reason()}"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


UNIFORM = [Uniform(bits, block) for bits, block in product(range(2, 9), (8, 24, 32, 40, 64, 128, 256, 1000, 1024))]
ROTATED = [Rotated(bits, block) for bits, block in product(LEVELS, (16, 32, 64, 128, 256))]
SPIKE = [Spike(bits, block) for bits, block in product(range(2, 9), (8, 24, 32, 64, 128, 256))]


@pytest.mark.parametrize("codec", UNIFORM + ROTATED + SPIKE, ids=str)
def test_equals_the_definition(codec):
    assert type(codec) is Uniform or extension.has_cuda_kernel(codec.native, torch.bfloat16)
    for dtype, numel in product(DTYPES, (1, 7, 2049, 100_003)):
        parts = [strange(numel, dtype, seed) for seed in range(3)]
        payloads = [codec.encode_ref(x) for x in parts]
        out = torch.full((codec.wire_bytes(numel),), 0xEE, dtype=torch.uint8, device="cuda")
        found = [codec.encode(x.cuda(), out.clone()) for x in parts]
        assert all(torch.equal(f.cpu(), p) for f, p in zip(found, payloads, strict=True)), (dtype, numel)
        for count in (1, 3):
            total = torch.full((numel,), torch.nan, dtype=dtype, device="cuda")
            codec.decode_sum(found[:count], total)
            assert same(total, codec.decode_sum_ref(payloads[:count], numel, dtype)), (dtype, numel, count)


@pytest.mark.parametrize("codec", [Rotated(4.5, 32), Rotated(5, 64), Rotated(8, 16)], ids=str)
def test_memories_equal_the_definition(codec):
    for dtype, numel in product(DTYPES, (1, 2049, 30_003)):
        defined = torch.zeros(codec.residual_numel(numel), dtype=dtype)
        memory = defined.cuda()
        for seed in range(3):
            x = strange(numel, dtype, seed)
            found = codec.encode(x.cuda(), residual=memory)
            assert torch.equal(found.cpu(), codec.encode_residual_ref(x, defined)), dtype
            assert same(memory, defined), (dtype, numel, seed)


def test_every_16_bit_pattern():
    """All numbers of both half types, each beside its neighbours and beside zeros of both signs."""
    for dtype, block in product((torch.float16, torch.bfloat16), (8, 32)):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        codecs = [Uniform(bits, block) for bits in (2, 4, 8)] + [Rotated(4.5, max(block, 16)), Spike(3, block)]
        for x in (patterns, patterns.view(8, -1).t().reshape(-1), torch.stack([patterns, patterns * 0], 1).view(-1)):
            values = x.contiguous().view(dtype)
            for codec in codecs:
                payload = codec.encode_ref(values)
                assert torch.equal(codec.encode(values.cuda()).cpu(), payload), (dtype, codec)
                decoded = codec.decode_sum([payload.cuda()], torch.empty_like(values, device="cuda"))
                assert same(decoded, codec.decode_sum_ref([payload], values.numel(), dtype)), (dtype, codec)


@pytest.mark.parametrize("codec", [Uniform(4, 32), Rotated(4.5, 32), Spike(4, 64)], ids=str)
def test_unaligned_views(codec):
    base = strange(50_001, torch.bfloat16).cuda()
    for start in range(1, 8):
        x = base[start:]
        payload = codec.encode(x)
        assert torch.equal(payload.cpu(), codec.encode_ref(x.cpu()))
        out = torch.full_like(base, torch.nan)[start:]
        assert same(codec.decode_sum([payload], out), codec.decode_sum_ref([payload.cpu()], x.numel(), x.dtype))


@pytest.mark.parametrize("codec", [Uniform(4, 32), Rotated(4.5, 32), Spike(4, 64)], ids=str)
def test_more_than_two_to_the_31_values(codec):
    numel = 2**31 + 4096 + 5
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    tail = x[2**31 :]  # starts a block
    tail.copy_(torch.randn(tail.numel(), device="cuda"))
    out = codec.decode_sum([codec.encode(x)], torch.full_like(x, torch.nan))
    cpu = tail.cpu()
    assert same(out[2**31 :], codec.decode_sum_ref([codec.encode_ref(cpu)], cpu.numel(), cpu.dtype))
    assert not out[: 2**31].any()
