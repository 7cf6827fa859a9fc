"""Uniform: what the format promises, and that the compiled codec gives the definition's bits on every instruction set.

``encode_ref`` and ``decode_sum_ref`` are the definition. The first half holds them to the promises of uniform.py's
docstring; the second compares compiled code with them, bit for bit, on data that no codec likes.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from codec_cases import DTYPES, KINDS, native_decode_sum, native_encode, same, tensor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashcomm_megatron.codec import Uniform
from flashcomm_megatron.codec import native as compiled

WIDTHS = range(2, 9)
BLOCKS = (8, 24, 32, 64, 128, 256)  # 32, 64 and 128 have loops of their own
LENGTHS = (0, 1, 7, 8, 9, 31, 33, 129, 1000)
LONG = 4501  # two strips and a tail of the compiled codec

needs_extension = pytest.mark.skipif(not compiled.available(), reason=f"no compiled codec: {compiled.reason()}")


def roundtrip(codec: Uniform, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return codec.decode_sum_ref([codec.encode_ref(x)], x.numel(), dtype or x.dtype)


# ---- the format ------------------------------------------------------------------------------------------------


def largest_error(x: Tensor, found: Tensor, codec: Uniform) -> Tensor:
    """The bound of uniform.py's docstring for every element, in float64.

    Half a scale, where the scale spans the block and what bfloat16 adds to it: rounding the minimum down and the scale
    up, both relative 2**-7 or one denormal. Choosing the code in float32 costs 2**-14 of a scale more (255 steps, three
    roundings of 2**-24 each); the result is rounded to float32 and to its dtype.
    """
    missing = -x.numel() % codec.block
    blocks = torch.cat([x, x[-1:].expand(missing)]).double().view(-1, codec.block)
    low, high, least = blocks.amin(1), blocks.amax(1), 2.0**-133
    inexact = (low.float().bfloat16().double() != low).double()
    scale = (high - low + inexact * (low.abs() * 2**-7 + least)) / codec.levels * (1 + 2**-7) + least
    scale = scale.repeat_interleave(codec.block)[: x.numel()]
    info = torch.finfo(found.dtype)
    rounding = found.double().abs() * (info.eps / 2 + 2**-24) + info.smallest_normal * info.eps
    return scale * (0.5 + 2**-14) + rounding


@pytest.mark.parametrize(
    "kind", ["normal", "one_sided", "denormals", "tiny", "signed_zeros", "huge", "outlier", "octaves"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_the_analytic_bound(kind: str, dtype: torch.dtype) -> None:
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.bfloat16).max)  # beyond it float32 saturates
    x = tensor(kind, 3000, dtype).clamp(-limit, limit)
    for bits in WIDTHS:
        for block in (8, 32, 128):
            codec = Uniform(bits, block)
            found = roundtrip(codec, x)
            error = (found.double() - x.double()).abs()
            assert (error <= largest_error(x, found, codec)).all(), f"{codec}"


def test_saturating_float32_is_bounded_by_bfloat16s_range() -> None:
    x = torch.tensor([3.4028235e38, -3.4028235e38, 0.0, 1.0] * 8)
    for bits in WIDTHS:
        found = roundtrip(Uniform(bits, 32), x)
        assert (
            found.isfinite().all() and (found.double() - x.double()).abs().max() <= 3.4028235e38 / (2**bits - 1) * 1.02
        )


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_are_exact(bits: int, dtype: torch.dtype) -> None:
    for kind in ("constants", "patterns"):
        x = tensor(kind, 640, dtype)
        x = torch.where(x.isfinite(), x, 1.0)[::5].repeat_interleave(128).contiguous()
        codec = Uniform(bits, 128)
        payload = codec.encode_ref(x)
        found = codec.decode_sum_ref([payload], x.numel(), dtype)
        assert torch.equal(found, x)  # as numbers: -0 may decode to +0
        assert torch.equal(codec.encode_ref(found), payload) or (x == 0).any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_values_on_the_grid_are_exact(bits: int) -> None:
    """Sums of such values do not depend on their order, so that collectives can be compared with exact ones."""
    codec, generator = Uniform(bits, 32), torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (50, 32), generator=generator)
    codes[:, :2] = torch.tensor([0, 2**bits - 1])
    offsets = torch.randint(-128, 128, (50, 1), generator=generator)
    x = ((codes + offsets) * 2.0 ** torch.randint(-8, 8, (50, 1), generator=generator)).flatten()
    assert torch.equal(roundtrip(codec, x), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_nan_or_inf_decodes_to_nan_and_no_other_block_does(dtype: torch.dtype, bad: float) -> None:
    x = tensor("normal", 300, dtype)
    x[70] = bad
    for bits in WIDTHS:
        found = roundtrip(Uniform(bits, 32), x)
        assert found[64:96].isnan().all()
        assert found[:64].isfinite().all() and found[96:].isfinite().all()


def test_every_part_of_a_sum_is_limited_and_the_sum_overflows() -> None:
    codec, x = Uniform(4, 32), torch.linspace(-3e5, 3e5, 32)
    payload = codec.encode_ref(x)
    assert codec.decode_sum_ref([payload], 32, torch.float16).abs().max() == 65504
    assert codec.decode_sum_ref([payload, payload], 32, torch.float16).isinf().any()


@given(n=st.integers(0, 5000), bits=st.integers(2, 8), block=st.sampled_from(BLOCKS))
def test_length_depends_on_the_number_of_values_alone(n: int, bits: int, block: int) -> None:
    codec, sizes = Uniform(bits, block), Uniform(bits, block).section_bytes(n)
    assert codec.wire_bytes(n) == sum(math.ceil(size / 16) * 16 for size in sizes)
    assert sum(sizes) == math.ceil(n / 8) * bits + 4 * math.ceil(n / block)
    x = torch.ones(n)
    assert codec.encode_ref(x).numel() == codec.wire_bytes(n)


@pytest.mark.parametrize(("bits", "block"), [(1, 32), (9, 32), (4, 0), (4, 12)])
def test_wrong_formats_are_refused(bits: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}|block={block}"):
        Uniform(bits, block)


# ---- compiled code equals the definition -----------------------------------------------------------------------


def encoded(codec: Uniform, x: Tensor, into: Tensor | None = None) -> Tensor:
    out = torch.full((codec.wire_bytes(x.numel()),), 0xAA, dtype=torch.uint8) if into is None else into
    assert native_encode(codec, x, out)
    return out


def decoded(codec: Uniform, payloads: list[Tensor], n: int, dtype: torch.dtype) -> Tensor:
    out = torch.full((n,), 42.0, dtype=dtype)
    assert native_decode_sum(codec, payloads, out)
    return out


def compare(native: ModuleType, codec: Uniform, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Encode x, and decode to every dtype, with every instruction set."""
    payload = codec.encode_ref(x)
    expected = [codec.decode_sum_ref([payload], x.numel(), dtype) for dtype in dtypes]
    for isa in native.info()["isas"]:
        assert native.use_isa(isa)
        assert torch.equal(encoded(codec, x), payload), f"{isa} encode {codec} {x.dtype} {x.numel()}"
        for dtype, values in zip(dtypes, expected, strict=True):
            found = decoded(codec, [payload], x.numel(), dtype)
            assert same(found, values), f"{isa} decode {codec} {x.dtype} {x.numel()} to {dtype}"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_equals_definition_at_every_length(native: ModuleType, bits: int, block: int) -> None:
    for dtype in DTYPES:
        for n in LENGTHS:
            compare(native, Uniform(bits, block), tensor("normal", n, dtype, seed=n), (dtype,))


@pytest.mark.parametrize("block", [32, 64, 128])
def test_compiled_equals_definition_at_every_number_of_blocks(native: ModuleType, block: int) -> None:
    """Vectors hold two or four blocks, and the last of a strip may be done twice; a strange block has its own path."""
    for blocks in range(1, 41):
        x = tensor("normal", blocks * block, torch.bfloat16, seed=blocks)
        compare(native, Uniform(4, block), x, (torch.bfloat16,))
        x[blocks // 2 * block] = math.inf
        compare(native, Uniform(4, block), x, (torch.bfloat16,))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_definition_on_every_kind_of_data(native: ModuleType, kind: str, block: int) -> None:
    for dtype in DTYPES:
        x = tensor(kind, LONG, dtype)
        for bits in WIDTHS:
            compare(native, Uniform(bits, block), x, DTYPES if bits in (4, 8) else (dtype,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_decodes_any_bytes_as_defined(native: ModuleType, dtype: torch.dtype) -> None:
    """Bytes that no encoder writes, too."""
    generator = torch.Generator().manual_seed(0)
    for bits in WIDTHS:
        for block in BLOCKS:
            codec = Uniform(bits, block)
            size = (codec.wire_bytes(LONG),)
            payloads = [torch.randint(0, 256, size, generator=generator, dtype=torch.uint8) for _ in range(2)]
            for count in (1, 2):
                expected = codec.decode_sum_ref(payloads[:count], LONG, dtype)
                for isa in native.info()["isas"]:
                    native.use_isa(isa)
                    assert same(decoded(codec, payloads[:count], LONG, dtype), expected), f"{isa} {codec} {count}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_sums_run_in_order(native: ModuleType, count: int, dtype: torch.dtype) -> None:
    kinds = ["octaves", "normal", "strange", "huge", "one_sided"]
    for block in (24, 32, 64, 128):
        codec = Uniform(5, block)
        payloads = [codec.encode_ref(tensor(kind, LONG, torch.float32, seed=1)) for kind in kinds[:count]]
        expected = codec.decode_sum_ref(payloads, LONG, dtype)
        for isa in native.info()["isas"]:
            native.use_isa(isa)
            assert same(decoded(codec, payloads, LONG, dtype), expected), f"{isa} {codec}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_pattern_survives(native: ModuleType, dtype: torch.dtype) -> None:
    """As constant blocks, in the vectorised loops and value by value."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for block in (8, 32):
        codec, x = Uniform(4, block), words.repeat_interleave(block)
        expected = torch.where(x.isfinite(), x, math.nan)
        for isa in native.info()["isas"]:
            native.use_isa(isa)
            found = decoded(codec, [encoded(codec, x)], x.numel(), dtype)
            assert torch.equal(found.isnan(), expected.isnan()), isa
            assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0)), isa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_rounds_to_16_bits_as_torch_does(native: ModuleType, dtype: torch.dtype) -> None:
    """Midpoints between all neighbours and the numbers beside them, against torch's conversion."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    words = words[words.isfinite()].sort().values
    middle = ((words[1:].double() + words[:-1].double()) / 2).float()
    x = torch.cat([middle, middle.nextafter(torch.tensor(math.inf)), middle.nextafter(torch.tensor(-math.inf))])
    codec = Uniform(2, 8)  # every constant is exact in float32
    payload = encoded(codec, x.repeat_interleave(8))
    for isa in native.info()["isas"]:
        native.use_isa(isa)
        assert torch.equal(decoded(codec, [payload], 8 * x.numel(), dtype)[::8], x.to(dtype)), isa


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_sums_round_as_torch_does(native: ModuleType, dtype: torch.dtype) -> None:
    """Two bfloat16 constants a few octaves apart hit ties all the time; against torch's addition and conversion."""
    generator, count = torch.Generator().manual_seed(3), 20000
    shape = (2, count)
    exponents = torch.randint(-28, 15, (1, count), generator=generator) + torch.randint(
        -9, 1, shape, generator=generator
    )
    x = torch.ldexp(torch.randint(-255, 256, shape, generator=generator).float(), exponents - 8)
    codec = Uniform(4, 32)
    payloads = [encoded(codec, each.repeat_interleave(32)) for each in x]
    for isa in native.info()["isas"]:
        native.use_isa(isa)
        assert torch.equal(decoded(codec, payloads, 32 * count, dtype)[::32], (x[0] + x[1]).to(dtype)), isa


@needs_extension
def test_compiled_takes_tensors_at_any_address() -> None:
    """Tensors need their elements' alignment only, payloads none."""
    codec, x = Uniform(7, 32), tensor("normal", LONG + 1, torch.bfloat16)[1:]
    size = codec.wire_bytes(LONG)
    payload = encoded(codec, x, torch.empty(size + 3, dtype=torch.uint8)[3:])
    assert torch.equal(payload, codec.encode_ref(x))
    out = torch.empty(LONG + 1, dtype=torch.bfloat16)[1:]
    assert native_decode_sum(codec, [payload], out)
    assert torch.equal(out, codec.decode_sum_ref([payload], LONG, torch.bfloat16))


@needs_extension
@given(
    seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=3),
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=3, max_size=3),
    n=st.integers(0, 5000),
    bits=st.integers(2, 8),
    block=st.integers(1, 40).map(lambda octets: 8 * octets),
    dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from(DTYPES),
)
def test_compiled_equals_definition_on_random_cases(
    seeds: list[int], kinds: list[str], n: int, bits: int, block: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    codec = Uniform(bits, block)
    parts = [tensor(kind, n, dtype, seed) for kind, seed in zip(kinds, seeds, strict=False)]
    payloads = [codec.encode_ref(part) for part in parts]
    for part, payload in zip(parts, payloads, strict=True):
        assert torch.equal(encoded(codec, part), payload)
    if n:
        expected = codec.decode_sum_ref(payloads, n, out_dtype)
        assert same(decoded(codec, payloads, n, out_dtype), expected)
