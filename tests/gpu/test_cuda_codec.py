"""The codec kernels on a GPU: bit for bit what the definition says, for every width, number type and kind of block."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from codec_cases import KINDS, tensor
from specification import fading, same, strange

from flashcomm_megatron.codec import Rotated, Spike, Uniform
from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.codec.base import Slices
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
def test_codec_kernels_equal_the_definition(codec):
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


def check(codec, parts):
    """Payloads of all parts, one of them decoded, and their sum."""
    numel, dtype = parts[0].numel(), parts[0].dtype
    payloads = [codec.encode_ref(x) for x in parts]
    found = [codec.encode(x.cuda()) for x in parts]
    assert all(torch.equal(f.cpu(), p) for f, p in zip(found, payloads, strict=True)), (codec, dtype)
    for count in (1, len(parts)):
        total = torch.full((numel,), torch.nan, dtype=dtype, device="cuda")
        codec.decode_sum(found[:count], total)
        assert same(total, codec.decode_sum_ref(payloads[:count], numel, dtype)), (codec, dtype, count)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_codec_must_survive(kind):
    for dtype, codec in product(
        DTYPES, (Uniform(3, 32), Rotated(4, 32), Rotated(2.5, 16), Rotated(7.5, 64), Spike(2, 64))
    ):
        check(codec, [tensor(kind, 3001, dtype, seed) for seed in range(3)])
    for dtype in (torch.float16, torch.bfloat16):
        check(Rotated(5, 256), [tensor(kind, 9001, dtype, seed) for seed in range(3)])


def test_steps_far_below_the_largest_of_their_super_block():
    """Blocks of a super-block whose magnitudes are up to 2**30 apart: the distance of a step ends at 125."""
    for codec, dtype in product((Rotated(4.5, 32), Rotated(8, 64)), (torch.float32, torch.bfloat16)):
        scales = torch.arange(math.ceil(6000 / codec.block)).repeat_interleave(codec.block)[:6000] % 31
        parts = [torch.randn(6000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        check(codec, [torch.ldexp(part, -scales).to(dtype) for part in parts])


def test_blocks_without_a_cuda_kernel_are_left_to_torch():
    for codec, dtype in ((Rotated(4, 256), torch.float32), (Rotated(4, 512), torch.bfloat16)):
        assert not extension.has_cuda_kernel(codec.native, dtype)


# ---- all slices of a tensor in one launch ----------------------------------------------------------------------

SLICED = [Uniform(4, 32), Uniform(5, 40), Uniform(3, 1000), Rotated(4.5, 32), Rotated(8, 64), Spike(3, 64)]


def cut(codec, numel, world):
    """Slices of whole units; the last ones are short or empty."""
    unit = codec.block * (32 if isinstance(codec, Rotated) else 1)
    return Slices(numel, numel, math.ceil(math.ceil(numel / world) / unit) * unit, world)


def arguments(codec, slices):
    stride = codec.wire_bytes(slices.length, slices.width)
    return codec.fitted(slices.width).native, slices.width, slices.numel, slices.length, slices.world, stride


def stream():
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("codec", SLICED, ids=str)
def test_slices_are_encoded_and_decoded_as_one_by_one(codec):
    cuda = extension.cuda()
    for dtype, (numel, world) in product(DTYPES, ((1, 2), (5000, 3), (9001, 4), (65_536, 8), (3000, 8))):
        x, slices = strange(numel, dtype), cut(codec, numel, world)
        stride = codec.wire_bytes(slices.length, slices.width)
        wanted = [codec.encode_ref(part, slices.width) for part in slices.of(x) if part.numel()]
        on_device = x.cuda()
        payloads = torch.full((world * stride,), 0xEE, dtype=torch.uint8, device="cuda")
        number = extension.DTYPES[dtype]
        cuda.encode_slices_cuda(
            on_device.data_ptr(), 0, number, *arguments(codec, slices), payloads.data_ptr(), stream()
        )
        found = payloads.cpu().view(world, stride)
        for row, want in zip(found, wanted, strict=False):
            assert torch.equal(row[: want.numel()], want), (dtype, numel, world)
        assert (found[len(wanted) :] == 0xEE).all(), "nothing is written for empty slices"
        out = torch.full_like(on_device, torch.nan)
        cuda.decode_slices_cuda(payloads.data_ptr(), *arguments(codec, slices), out.data_ptr(), number, stream())
        parts = [
            codec.decode_sum_ref([want], part.numel(), dtype, slices.width)
            for want, part in zip(wanted, slices.of(x), strict=False)
        ]
        assert same(out, torch.cat(parts)), (dtype, numel, world)


@pytest.mark.parametrize("codec", [Rotated(4.5, 32), Rotated(8, 16)], ids=str)
def test_slices_have_residuals_of_their_own(codec):
    cuda, slices = extension.cuda(), cut(codec, 9001, 4)
    for dtype in DTYPES:
        sizes = [codec.residual_numel(slices.size(number), slices.width) for number in range(slices.world)]
        defined = [torch.zeros(size, dtype=dtype) for size in sizes]
        residual = torch.zeros(sum(sizes), dtype=dtype, device="cuda")
        payloads = torch.empty(4 * codec.wire_bytes(slices.length, slices.width), dtype=torch.uint8, device="cuda")
        for seed in range(2):
            x = strange(9001, dtype, seed)
            for part, own in zip(slices.of(x), defined, strict=True):
                if part.numel():
                    codec.encode_residual_ref(part, own, slices.width)
            on_device, number = x.cuda(), extension.DTYPES[dtype]
            cuda.encode_slices_cuda(
                on_device.data_ptr(),
                residual.data_ptr(),
                number,
                *arguments(codec, slices),
                payloads.data_ptr(),
                stream(),
            )
            assert same(residual, torch.cat(defined)), (dtype, seed)


PAIRS = [
    (Uniform(4, 32), Uniform(4, 32)),
    (Uniform(4, 128), Uniform(8, 128)),
    (Uniform(4, 1000), Uniform(4, 1000)),
    (Uniform(4, 32), Uniform(7, 64)),  # no kernel for the pair: two launches
    (Rotated(4.5, 32), Rotated(5, 64)),
    (Rotated(3, 16), Rotated(8, 16)),
    (Spike(3, 32), Spike(3, 32)),
]


@pytest.mark.parametrize("legs", PAIRS, ids=str)
def test_sums_are_encoded_as_out_holds_them(legs):
    cuda, (reduce, gather) = extension.cuda(), legs
    for dtype, (numel, world) in product(DTYPES, ((1, 2), (5003, 3), (65_536, 2))):
        parts = [reduce.encode_ref(strange(numel, dtype, seed)) for seed in range(world)]
        wanted = reduce.decode_sum_ref(parts, numel, dtype)
        on_device = [part.cuda() for part in parts]
        keeps = gather.keeps_residuals
        defined = torch.zeros(gather.residual_numel(numel), dtype=dtype) if keeps else None
        residual = defined.cuda() if keeps else None
        for _ in range(2 if keeps else 1):
            payload = torch.full((gather.wire_bytes(numel),), 0xEE, dtype=torch.uint8, device="cuda")
            out = torch.full((numel,), torch.nan, dtype=dtype, device="cuda")
            cuda.reduce_slices_cuda(
                [part.data_ptr() for part in on_device],
                reduce.fitted(numel).native,
                numel,
                numel,
                out.data_ptr(),
                extension.DTYPES[dtype],
                gather.fitted(numel).native,
                payload.data_ptr(),
                residual.data_ptr() if keeps else 0,
                stream(),
            )
            encoded = gather.encode_residual_ref(wanted, defined) if keeps else gather.encode_ref(wanted)
            assert same(out, wanted) and torch.equal(payload.cpu(), encoded), (dtype, numel, world)
            assert not keeps or same(residual, defined)


@pytest.mark.parametrize("codec", [Rotated(4.5, 32), Rotated(5, 64), Rotated(8, 16)], ids=str)
def test_codec_kernels_with_residuals_equal_the_definition(codec):
    for dtype, numel in product(DTYPES, (1, 2049, 30_003)):
        defined = torch.zeros(codec.residual_numel(numel), dtype=dtype)
        residual = defined.cuda()
        for seed in range(3):
            x = strange(numel, dtype, seed)
            found = codec.encode(x.cuda(), residual=residual)
            assert torch.equal(found.cpu(), codec.encode_residual_ref(x, defined)), dtype
            assert same(residual, defined), (dtype, numel, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_of_what_a_codec_must_survive(kind):
    for dtype, codec in product(DTYPES, (Rotated(4.5, 32), Rotated(5, 64), Rotated(8, 16))):
        check_residuals(codec, [tensor(kind, 3001, dtype, seed) for seed in range(3)])


def test_signed_zeros_of_a_residual():
    for codec in (Rotated(3, 16), Rotated(4.5, 32), Rotated(5, 64)):
        check_residuals(codec, list(fading(3001)))


def check_residuals(codec, calls):
    """One tensor after the other with the same residual."""
    defined = torch.zeros(codec.residual_numel(calls[0].numel()), dtype=calls[0].dtype)
    residual = defined.cuda()
    for x in calls:
        found = codec.encode(x.cuda(), residual=residual)
        assert torch.equal(found.cpu(), codec.encode_residual_ref(x, defined)), codec
        assert same(residual, defined), codec


def test_every_16_bit_pattern_decodes_as_defined():
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
def test_unaligned_views_give_the_same_bits(codec):
    base = strange(50_001, torch.bfloat16).cuda()
    for start in range(1, 8):
        x = base[start:]
        payload = codec.encode(x)
        assert torch.equal(payload.cpu(), codec.encode_ref(x.cpu()))
        out = torch.full_like(base, torch.nan)[start:]
        assert same(codec.decode_sum([payload], out), codec.decode_sum_ref([payload.cpu()], x.numel(), x.dtype))


@pytest.mark.parametrize("codec", [Uniform(4, 32), Rotated(4.5, 32), Spike(4, 64)], ids=str)
def test_more_than_two_to_the_31_values_are_encoded(codec):
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
