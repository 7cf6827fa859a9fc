"""Rotated blocks: the analytic bound, exact constants, NaN, every magnitude and length, the documented wire."""

from __future__ import annotations

import math
import re

import pytest
import torch
from codec_cases import DTYPES, KINDS, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashcomm_megatron.codec import Rotated, rotated
from flashcomm_megatron.codec.rotated import LEVELS, butterflies

WIDTHS = sorted(LEVELS)
STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of the output's rounding


def through(codec: Rotated, x: Tensor) -> Tensor:
    """decode(encode(x)) in x's dtype."""
    payload = codec.encode_ref(x)
    assert payload.dtype == torch.uint8 and payload.numel() == codec.wire_bytes(x.numel())
    return codec.decode_sum_ref([payload], x.numel(), x.dtype)


def hadamard(length: int) -> Tensor:
    """Sylvester's construction, float64: not the code under test."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < length:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def blocks_of(x: Tensor, block: int) -> Tensor:
    return torch.cat([x, x[-1:].expand(-x.numel() % block)]).view(-1, block).double()


def bound(codec: Rotated, x: Tensor) -> Tensor:
    """Largest error allowed of each value, float64, as the module docstring has it; NaN for a block that is not finite.

    Steps are computed anew from float64 coefficients, as the interval that rounding to three mantissa bits and the
    floors (15 5/8 octaves below the largest step of 32 blocks, 2**-100) leave them.
    """
    codec = codec.fitted(x.numel())  # blocks fit the row
    blocks = blocks_of(x, codec.block)
    coefficients = blocks @ hadamard(codec.block) / codec.block
    finite = blocks.isfinite().all(1)
    constant = (blocks == blocks[:, :1]).all(1)
    needed = torch.where(finite & ~constant, coefficients.abs().amax(1) / codec.zero, 0.0)
    least, most = (16 / 17, 17 / 16) if codec.levels <= 32 else (1, 9 / 8)
    least *= 2 / 3 if codec.levels < 8 else 4 / 5 if codec.levels <= 16 else 1  # the finest of the steps tried
    steps = (most * needed * (1 + 2.0**-20)).clamp(min=2.0**-100)
    for first in range(0, len(blocks), 32):
        super_block = steps[first : first + 32]
        super_block.clamp_(min=super_block.max().item() * 9 / 8 * 2.0 ** (-125 / 8))
    reach = (codec.levels - 1 - codec.zero) * least * needed
    beyond = coefficients.abs() - reach[:, None]
    errors = torch.maximum(steps[:, None] / 2, beyond).sum(1)
    errors = torch.where(constant, 0.0, errors) + blocks.abs().amax(1) * codec.block * 2.0**-22
    return torch.where(finite, errors, math.nan)[:, None].expand_as(blocks).flatten()[: x.numel()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_within_the_bound(kind: str, dtype: torch.dtype) -> None:
    for bits in (2, 2.5, 4, 4.5, 5, 7.5, 8):
        for block in (16, 32, 128):
            codec, x = Rotated(bits, block), tensor(kind, 1300, dtype)
            y, limit = through(codec, x), bound(codec, x)
            assert torch.equal(y.isnan(), limit.isnan())
            rounding = y.double().abs() * STEP[dtype] + torch.finfo(dtype).smallest_normal * STEP[dtype]
            excess = ((y.double() - x.double()).abs() - limit - rounding)[~limit.isnan()]
            assert not excess.numel() or excess.max() <= 0, f"{bits} bits, block {block}: {excess.max():.3g} beyond"


@pytest.mark.parametrize(
    ("bits", "block", "least"), [(2, 32, 1.05), (2.5, 32, 1.2), (3, 64, 1.04), (3.5, 32, 1.05), (4, 64, 1.02)]
)
def test_steps_of_few_levels_lose_less_than_those_that_reach_the_largest(bits: float, block: int, least: float) -> None:
    """Root mean square error of steps max|c| / zero, over the codec's, for normal values."""
    x = tensor("normal", 2**15, torch.float32)
    codec = Rotated(bits, block)
    coefficients = butterflies(x.view(-1, block)) / block
    largest = coefficients.gather(1, coefficients.abs().argmax(1, keepdim=True))
    step = -largest / codec.zero
    reaching = (coefficients / step).round().clamp(-codec.zero, codec.levels - 1 - codec.zero) * step
    lost = (butterflies(reaching) - x.view(-1, block)).norm()
    assert lost > least * (through(codec, x) - x).norm()


def test_an_outlier_alone_in_its_block_stays_exact() -> None:
    """All coefficients are alike: a finer step would cut every one of them."""
    x = torch.zeros(64)
    x[5], x[40] = 96.0, -7.0
    for bits in (2.5, 3.5):  # as many codes on either side
        assert torch.allclose(through(Rotated(bits, 32), x), x, rtol=1 / 16, atol=1e-4), bits


def test_a_width_too_few_breaks_the_bound() -> None:
    x = tensor("normal", 1300, torch.float32)
    assert ((through(Rotated(4, 32), x) - x).abs() > bound(Rotated(8, 32), x)).any()


def test_squared_errors_are_those_of_the_coefficients() -> None:
    """Half a step of every coefficient is the worst of a block's mean, far below the sum that bounds a value."""
    x = tensor("normal", 32 * 64, torch.float32)
    errors = (through(Rotated(5, 32), x) - x).view(-1, 32).double()
    coefficients = x.view(-1, 32).double() @ hadamard(32) / 32
    step = 17 / 16 * coefficients.abs().amax(1) / 16
    assert (errors.square().mean(1).sqrt() <= math.sqrt(32) * step).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_constants_are_exact(bits: float) -> None:
    for dtype in DTYPES:
        limits = torch.finfo(dtype)
        for value in (0.0, 1 / 3, -1 / 3, 5.0, -1e-4, limits.max, limits.min, limits.tiny, -limits.tiny / 3, 1.0000001):
            for numel, block in ((1, 32), (31, 16), (130, 64)):
                x = torch.full((numel,), value, dtype=dtype)
                assert torch.equal(through(Rotated(bits, block), x), x), f"{value} x {numel} in {dtype}"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_value_turns_its_block_and_no_other_into_nan(dtype: torch.dtype, bad: float) -> None:
    x = tensor("normal", 220, dtype)
    for place in (0, 40, 63, 219):
        broken = x.clone()
        broken[place] = bad
        y = through(Rotated(4.5, 32), broken)
        block = torch.arange(220) // 32 == place // 32
        assert y[block].isnan().all()
        assert torch.equal(y[~block], through(Rotated(4.5, 32), x)[~block])


@pytest.mark.parametrize("numel", [1, 2, 15, 16, 17, 31, 33, 1000, 1024, 1025, 1057])
def test_error_is_bounded_at_any_length(numel: int) -> None:
    x = tensor("normal", numel, torch.float32)
    for codec in (Rotated(2, 16), Rotated(4.5, 32), Rotated(8, 64)):
        assert (through(codec, x) - x).abs().max() <= bound(codec, x).max() + 1e-6


def test_an_empty_tensor_is_an_empty_payload() -> None:
    codec, nothing = Rotated(4.5, 32), torch.empty(0)
    assert codec.wire_bytes(0) == 0 and codec.encode(nothing).numel() == 0
    assert codec.decode_sum([codec.encode(nothing)], nothing).numel() == 0


def test_butterflies_are_the_hadamard_matrix() -> None:
    x = torch.randint(-99, 100, (7, 64), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(butterflies(x), (x.double() @ hadamard(64)).float())
    assert torch.equal(butterflies(butterflies(x)), 64 * x)


def test_a_sum_is_that_of_the_parts() -> None:
    """Also where one part is a constant, is huge, or is NaN; nothing overflows that an exact sum would not."""
    codec = Rotated(4.5, 32)
    parts = [tensor(kind, 320, torch.float32, seed) for seed, kind in enumerate(("normal", "constants", "one_sided"))]
    payloads = [codec.encode_ref(part) for part in parts]
    alone = [codec.decode_sum_ref([payload], 320, torch.float32).double() for payload in payloads]
    found = codec.decode_sum_ref(payloads, 320, torch.float32)
    assert (found - sum(alone)).abs().max() <= 2.0**-17 * max(part.abs().max() for part in alone)

    big = torch.linspace(-1, 0.9, 64) * 3.4e38
    opposite = codec.decode_sum_ref([codec.encode_ref(big), codec.encode_ref(-big)], 64, torch.float32)
    assert torch.equal(opposite, torch.zeros(64))
    same_sign = codec.decode_sum_ref([codec.encode_ref(0.3 * big.abs() + 2.2e38)] * 2, 64, torch.float32)
    assert same_sign.isinf().all(), "a sum may overflow"
    assert through(codec, big).isfinite().all(), "a rounding may not"
    assert through(codec, torch.linspace(-65504, 65504, 64).half()).isfinite().all()


def test_sums_of_constants_are_exact() -> None:
    codec, values = Rotated(4.5, 32), (0.1, -7.3, 1e-3)
    payloads = [codec.encode_ref(torch.full((96,), value)) for value in values]
    exact = torch.tensor(values[0]) + torch.tensor(values[1]) + torch.tensor(values[2])
    assert torch.equal(codec.decode_sum_ref(payloads, 96, torch.float32), exact.expand(96))


def test_the_documented_levels_and_bytes() -> None:
    """The table of the docstring is the table of the code, and a wire of the documented parts."""
    doc = rotated.__doc__ or ""
    rows = [re.findall(r"[\d.]+", line) for line in doc.splitlines() if re.match(r" +(bits|levels)  ", line)]
    assert {float(b): int(n) for b, n in zip(*rows, strict=True)} == LEVELS
    for bits in WIDTHS:
        numel = 32 * 1024
        assert Rotated(bits, 32).wire_bytes(numel) * 8 / numel == bits + 8 / 32 + 16 / 1024
        assert LEVELS[bits] == int(2**bits), "as many codes as fit, or pairs of them where a width has a half"


def test_the_wire_byte_by_byte() -> None:
    """One block whose coefficients are chosen: c = (-3, 5, 0, ...) of block 16 at 4 bits."""
    coefficients = torch.zeros(1, 16)
    coefficients[0, :2] = torch.tensor([-3.0, 5.0])
    payload = Rotated(4, 16).encode_ref(butterflies(coefficients).flatten())
    # 5 / 8 is a step of three mantissa bits: key = (126 << 3) + 2; the largest coefficient is positive, so codes are
    # 8 - c / step: 8 + 4.8 -> 13, 8 - 8 -> 0, and 8 for the zeros.
    assert payload[:16].tolist() == [0x0D, *[0x88] * 7, *[0] * 8]
    assert payload[16:32].tolist() == [0x80, *[0] * 15]
    assert payload[32:48].tolist() == [(126 << 3 | 2) & 255, (126 << 3 | 2) >> 8, *[0] * 14]


def test_pairs_fill_their_planes() -> None:
    codec = Rotated(4.5, 32)
    codes = torch.randint(0, 22, (64,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    low, high = codec._split(codes)
    first = int(codes[0]) + int(codes[1]) * 22
    assert (low.numel(), high.numel()) == (32, 4)
    assert low[0] == first & 255 and high[0] & 1 == first >> 8
    assert torch.equal(codec._join([low, high]), codes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WIDTHS), st.sampled_from((16, 32, 64, 256)), st.integers(1, 700), st.integers(0, 2**31))
def test_any_bits_encode_and_decode(bits: float, block: int, numel: int, seed: int) -> None:
    codec, x = Rotated(bits, block), tensor("patterns", numel, torch.float32, seed)
    y, limit = through(codec, x), bound(codec, x)
    assert torch.equal(y.isnan(), limit.isnan())
    assert ((y.double() - x.double()).abs() <= limit + y.double().abs() * 2.0**-24)[~limit.isnan()].all()


def coefficients_of(codec: Rotated, residual: Tensor, blocks: int) -> Tensor:
    """A residual as float64 [blocks, block]; it holds, of every four blocks, four numbers of each in turns."""
    found = torch.zeros(blocks, codec.block, dtype=torch.float64)
    for index in range(blocks):
        for i in range(codec.block):
            found[index, i] = residual[index // 4 * 4 * codec.block + i // 4 * 16 + index % 4 * 4 + i % 4]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", [Rotated(4.5, 32), Rotated(2, 16), Rotated(8, 64)], ids=str)
def test_a_residual_is_what_the_codes_lost(codec: Rotated, dtype: torch.dtype) -> None:
    """Of coefficients, as the docstring has it, to within a rounding of the dtype; blocks of NaN and Inf have none."""
    residual, matrix = torch.zeros(codec.residual_numel(1000), dtype=dtype), hadamard(codec.block)
    for seed in range(3):
        x = tensor("strange", 1000, dtype, seed)
        blocks = blocks_of(x, codec.block)
        before = coefficients_of(codec, residual, len(blocks))
        payload = codec.encode_residual_ref(x, residual)
        decoded = codec.decode_sum_ref([payload], len(blocks) * codec.block, torch.float32)
        wanted = blocks @ matrix + before - decoded.double().view(-1, codec.block) @ matrix
        wanted = torch.where(blocks.isfinite().all(1, keepdim=True), wanted, 0.0)
        found = coefficients_of(codec, residual, len(blocks))
        assert (found - wanted).abs().max() <= wanted.abs().max() * 2 * STEP[dtype] + 1e-4  # 2: cut, not rounded
        assert found.isfinite().all() and found.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_exact_or_strange_leaves_no_residual(dtype: torch.dtype) -> None:
    """Constants of values and residual together; NaN, Inf and huge values, the last of which also do without one."""
    codec, residual = Rotated(3, 32), torch.zeros(128, dtype=dtype)
    x = tensor("normal", 128, dtype)
    x[32:64], x[70], x[96:100] = 3.0, math.nan, math.inf if dtype == torch.float16 else 2.0**100
    for _ in range(2):
        payload = codec.encode_residual_ref(x, residual)
        kept = coefficients_of(codec, residual, 4)
        assert kept[0].any() and not kept[1:].any()
    assert torch.equal(codec.decode_ref(payload, 128)[32:64], torch.full((32,), 3.0))
    residual.fill_(1.0)
    if dtype != torch.float16:
        assert torch.equal(codec.encode_residual_ref(x[96:], residual), codec.encode_ref(x[96:]))

    cancelled = torch.zeros(128, dtype=dtype)
    cancelled[1] = -5.0  # of the first block's second coefficient, which is all that it has beside the first
    block = (butterflies(torch.eye(32)[1:2])[0] * 5 / 32 + 2).to(dtype)
    payload = codec.encode_residual_ref(block, cancelled)
    assert torch.equal(codec.decode_ref(payload, 32), torch.full((32,), 2.0)) and not cancelled.any()


def test_residuals_are_finite_and_not_rounded_up() -> None:
    codec, large = Rotated(2, 16), torch.linspace(-60000, 65504, 64)
    residual = torch.zeros(64, dtype=torch.float16)
    codec.encode_residual_ref(large.half(), residual)
    assert residual.abs().max() == 65504

    exact, cut = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    codec.encode_residual_ref(large.bfloat16().float(), exact)
    codec.encode_residual_ref(large.bfloat16(), cut)
    assert (cut.float().abs() <= exact.abs()).all() and ((exact - cut).abs() <= exact.abs() / 128).all()


@pytest.mark.parametrize(("numel", "block"), [(640, 32), (1000, 64), (135, 16)])
def test_what_a_sum_of_roundings_lacks_is_the_last_residual(numel: int, block: int) -> None:
    """The errors of all encodings telescope, and stay as small as one."""
    codec, steps = Rotated(3, block), 50
    residual, padded = torch.zeros(codec.residual_numel(numel)), math.ceil(numel / block) * block
    terms = [tensor("normal", numel, torch.float32, seed) for seed in range(steps)]
    kept = sum(codec.decode_ref(codec.encode(term, residual=residual), padded).double() for term in terms)
    plain = sum(through(codec, term) for term in terms)
    lacking = sum(blocks_of(term, block) for term in terms) - kept.view(-1, block)
    last = coefficients_of(codec, residual, padded // block) @ hadamard(block) / block
    assert torch.allclose(lacking, last, atol=1e-4)
    once = (through(codec, terms[0]) - terms[0]).square().mean()
    assert lacking.square().mean() < 2 * once < 0.2 * (plain - sum(terms)).square().mean()


@pytest.mark.parametrize(("bits", "block", "sentence"), [(4.2, 32, "in steps of 0.5"), (4, 24, "a power of two")])
def test_what_it_cannot_do_is_refused(bits: float, block: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Rotated(bits, block)
