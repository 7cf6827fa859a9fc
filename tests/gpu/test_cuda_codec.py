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


def test_every_rank_knows_which_rows_have_kernels():
    codecs = [
        Uniform(4, 128),
        Spike(4, 64),
        Rotated(4.5, 32),
        Rotated(5, 64),
        Rotated(4, 256),
        Rotated(4, 512),
    ]
    for dtype, codec, width in product(DTYPES, codecs, (16, 48, 96, 576, 1000, 2304, 2880, 3584, 4096, 5120, 7168)):
        for numel in (width, 8 * width):
            native = codec.fitted(width).native
            found = extension.has_cuda_kernel(native, dtype, numel, width)
            assert found == (not codec.without_kernel(dtype, numel, width)), (codec, dtype, numel, width)


# ---- all slices of a tensor in one launch ----------------------------------------------------------------------

SLICED = [Uniform(4, 32), Uniform(5, 40), Uniform(3, 1000), Rotated(4.5, 32), Rotated(8, 64), Spike(3, 64)]
# Values, values of a row, ranks: one row that is cut where blocks end, or rows, of which the last ranks have fewer.
SHAPES = [(1, 1, 2), (5000, 5000, 3), (9001, 9001, 4), (3000, 3000, 8), (5 * 2048, 2048, 3), (17 * 4000, 4000, 4)]


def cut(codec, numel, width, world):
    """Slices of whole rows, or of a single row, of whole units; the last ones are short or empty."""
    unit = width if width < numel else codec.unit
    return Slices(numel, width, math.ceil(math.ceil(numel / world) / unit) * unit, world)


def is_served(codec, slices, dtype):
    """Rows that kernels can code: multiples of what shares a scale. Others are left to torch, with the same bits."""
    return extension.has_cuda_kernel(codec.fitted(slices.width).native, dtype, slices.length, slices.width)


@pytest.mark.parametrize("codec", SLICED, ids=str)
def test_slices_are_encoded_and_decoded_as_one_by_one(codec):
    served = 0
    for dtype, (numel, width, world) in product(DTYPES, SHAPES):
        x, slices = strange(numel, dtype), cut(codec, numel, width, world)
        served += is_served(codec, slices, dtype)
        parts = [part for part in slices.of(x) if part.numel()]
        wanted = [codec.encode_ref(part, width) for part in parts]
        payloads = torch.full((codec.wire_bytes_of(slices),), 0xEE, dtype=torch.uint8, device="cuda")
        codec.encode_slices(x.cuda(), slices, payloads)
        assert torch.equal(payloads.cpu(), torch.cat(wanted)), (dtype, numel, width, world)
        out = torch.full((numel,), torch.nan, dtype=dtype, device="cuda")
        codec.decode_slices(payloads, slices, out)
        decoded = [
            codec.decode_sum_ref([each], part.numel(), dtype, width) for each, part in zip(wanted, parts, strict=True)
        ]
        assert same(out, torch.cat(decoded)), (dtype, numel, width, world)
    assert served >= 4 * len(DTYPES), "the kernels did most of it"


# Values, values of a row, ranks: rows that end inside a super-block of 32 blocks, those of many a model among them.
CUT_SHORT = [(5 * 5120, 5120, 3), (7 * 3584, 3584, 2), (9 * 2880, 2880, 2), (50 * 576, 576, 3), (90 * 96, 96, 4)]


@pytest.mark.parametrize("shape", CUT_SHORT, ids=str)
@pytest.mark.parametrize("codec", [Rotated(4.5, 32), Rotated(5, 64), Rotated(3, 32), Rotated(8, 16)], ids=str)
def test_rows_that_end_inside_a_super_block_have_kernels(codec, shape):
    numel, width, world = shape
    slices = cut(codec.fitted(width), numel, width, world)
    for dtype in DTYPES:
        assert is_served(codec, slices, dtype)
        x = strange(numel, dtype)
        parts = [part for part in slices.of(x) if part.numel()]
        wanted = [codec.encode_ref(part, width) for part in parts]
        payloads = torch.full((codec.wire_bytes_of(slices),), 0xEE, dtype=torch.uint8, device="cuda")
        codec.encode_slices(x.cuda(), slices, payloads)
        assert torch.equal(payloads.cpu(), torch.cat(wanted)), dtype
        out = torch.full((numel,), torch.nan, dtype=dtype, device="cuda")
        codec.decode_slices(payloads, slices, out)
        decoded = [
            codec.decode_sum_ref([each], part.numel(), dtype, width) for each, part in zip(wanted, parts, strict=True)
        ]
        assert same(out, torch.cat(decoded)), dtype


@pytest.mark.parametrize("width", [5120, 3584, 576, 96])
def test_sums_of_such_rows_are_encoded_with_residuals(width):
    """A leg of which the other's rows are whole super-blocks counts them as the other does."""
    legs = [
        (Rotated(4.5, 32), Rotated(5, 64)),
        (Rotated(6.5, 32), Rotated(5, 64)),
        (Rotated(4.5, 32), Rotated(6.5, 32)),
    ]
    for dtype, (reduce, gather), has_residual in product(DTYPES, legs, (False, True)):
        numel, world = 6 * width, 3
        parts = [reduce.encode_ref(strange(numel, dtype, seed), width) for seed in range(world)]
        wanted = reduce.decode_sum_ref(parts, numel, dtype, width)
        defined = torch.zeros(gather.residual_numel(numel, width), dtype=dtype)
        residual = defined.cuda() if has_residual else None
        for _ in range(2):
            payload = torch.full((gather.wire_bytes(numel, width),), 0xEE, dtype=torch.uint8, device="cuda")
            out = torch.full((numel,), torch.nan, dtype=dtype, device="cuda")
            reduce.reduce_slices([part.cuda() for part in parts], out, gather, payload, residual, width)
            encoded = (
                gather.encode_residual_ref(wanted, defined, width) if has_residual else gather.encode_ref(wanted, width)
            )
            assert same(out, wanted) and torch.equal(payload.cpu(), encoded), (dtype, reduce, gather, has_residual)
            assert residual is None or same(residual, defined)


@pytest.mark.parametrize("codec", [Rotated(4.5, 32), Rotated(8, 16)], ids=str)
def test_slices_have_residuals_of_their_own(codec):
    shapes = ((9001, 9001, 4), (7 * 2048, 2048, 3), (7 * 576, 576, 3), (5 * 2880, 2880, 2))
    for dtype, (numel, width, world) in product(DTYPES, shapes):
        slices = cut(codec, numel, width, world)
        assert is_served(codec, slices, dtype)
        sizes = [size for size in map(slices.size, range(world)) if size]
        defined = [torch.zeros(codec.residual_numel(size, width), dtype=dtype) for size in sizes]
        residuals = torch.zeros(codec.residual_numel_of(slices), dtype=dtype, device="cuda")
        payloads = torch.empty(codec.wire_bytes_of(slices), dtype=torch.uint8, device="cuda")
        for seed in range(2):
            x = strange(numel, dtype, seed)
            for part, own in zip(slices.of(x), defined, strict=False):
                codec.encode_residual_ref(part, own, width)
            codec.encode_slices(x.cuda(), slices, payloads, residuals)
            assert same(residuals, torch.cat(defined)), (dtype, seed)


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
    reduce, gather = legs
    for dtype, (numel, world) in product(DTYPES, ((1, 2), (5003, 3), (65_536, 2))):
        parts = [reduce.encode_ref(strange(numel, dtype, seed), numel) for seed in range(world)]
        wanted = reduce.decode_sum_ref(parts, numel, dtype, numel)
        on_device = [part.cuda() for part in parts]
        keeps = gather.keeps_residuals
        defined = torch.zeros(gather.residual_numel(numel, numel), dtype=dtype) if keeps else None
        residual = defined.cuda() if keeps else None
        for _ in range(2 if keeps else 1):
            payload = torch.full((gather.wire_bytes(numel, numel),), 0xEE, dtype=torch.uint8, device="cuda")
            out = torch.full((numel,), torch.nan, dtype=dtype, device="cuda")
            reduce.reduce_slices(on_device, out, gather, payload, residual, numel)
            encoded = gather.encode_residual_ref(wanted, defined, numel) if keeps else gather.encode_ref(wanted, numel)
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
