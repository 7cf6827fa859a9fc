"""Microscaling: every code of every element against the specification and ml_dtypes, scales, saturation, NaN, legs."""

from __future__ import annotations

import math

import pytest
import torch
from every_collective import DTYPES, SHAPES, every_collective
from ranks import spawn

from flashcomm_megatron.codec.published.microscaling import ELEMENTS, Microscaling
from flashcomm_megatron.config import Config

ML_DTYPES = {
    "e2m1": "float4_e2m1fn",
    "e2m3": "float6_e2m3fn",
    "e3m2": "float6_e3m2fn",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
}

# OCP MX specification v1.0, section 5.3: bias, largest normal, smallest normal, largest subnormal, smallest subnormal.
SPECIFICATION = {
    "e2m1": (1, 6.0, 1.0, 0.5, 0.5),
    "e2m3": (1, 7.5, 1.0, 0.875, 0.125),
    "e3m2": (3, 28.0, 0.25, 0.1875, 0.0625),
    "e4m3": (7, 448.0, 2.0**-6, 0.875 * 2.0**-6, 2.0**-9),
    "e5m2": (15, 57344.0, 2.0**-14, 0.75 * 2.0**-14, 2.0**-16),
}


def through(codec: Microscaling, x: torch.Tensor) -> torch.Tensor:
    """decode(encode(x)) in x's dtype."""
    payload = codec.encode(x)
    assert payload.numel() == codec.wire_bytes(x.numel())
    return codec.decode_sum([payload], torch.empty_like(x))


@pytest.mark.parametrize("name", SPECIFICATION)
def test_element_tables_have_the_specification_s_landmarks(name):
    bias, largest, smallest_normal, largest_subnormal, smallest_subnormal = SPECIFICATION[name]
    element = ELEMENTS[name]
    positive = element.table[: 1 << (element.bits - 1)]
    finite = positive[positive.isfinite()].tolist()
    assert finite == sorted(finite) and finite[0] == 0 and finite[-1] == largest == element.largest
    assert element.emin == 1 - bias and finite[1 << element.mantissa] == smallest_normal
    assert finite[1] == smallest_subnormal and finite[(1 << element.mantissa) - 1] == largest_subnormal
    assert torch.equal(element.table[len(positive) :], -positive) or not positive.isfinite().all()
    specials = {"e4m3": [math.nan], "e5m2": [math.inf, math.nan, math.nan, math.nan]}.get(name, [])
    assert str(positive[len(finite) :].tolist()) == str(specials)


def test_e2m1_and_the_integers_are_the_specification_s_values():
    assert ELEMENTS["e2m1"].table[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert ELEMENTS["int8"].table[[1, 64, 127, 128, 255]].tolist() == [2.0**-6, 1, 1.984375, -2, -(2.0**-6)]
    assert ELEMENTS["int4"].table.tolist() == [i / 4 for i in [*range(8), *range(-8, 0)]]
    assert ELEMENTS["e2m2"].table[[1, 3, 4, 15]].tolist() == [0.25, 0.75, 1, 7]
    assert ELEMENTS["e3m1"].table[[1, 2, 15]].tolist() == [0.125, 0.25, 24]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_has_the_value_ml_dtypes_gives_it(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numpy = pytest.importorskip("numpy")
    element = ELEMENTS[name]
    codes = numpy.arange(1 << element.bits, dtype=numpy.uint8)
    theirs = torch.from_numpy(codes.view(getattr(ml_dtypes, ML_DTYPES[name])).astype(numpy.float32))
    assert torch.equal(element.table.nan_to_num(-1.5, 2e5, -2e5), theirs.nan_to_num(-1.5, 2e5, -2e5))


def probes(name: str) -> torch.Tensor:
    """Every element, every midpoint of neighbours, their float32 neighbours, saturating values, of both signs."""
    table = ELEMENTS[name].table
    values = table[table.isfinite() & (table >= 0) & (table <= ELEMENTS[name].largest)].unique()
    middles = (values[1:] + values[:-1]) / 2
    beyond = ELEMENTS[name].largest * torch.tensor([1.01, 1.0625, 1.25, 1.3, 1.9, 1e6])
    points = torch.cat([values, middles, beyond])
    infinity = torch.full_like(points, math.inf)
    points = torch.cat([points, points.nextafter(infinity), points[1:].nextafter(-infinity[1:])])
    return torch.cat([points, -points])


@pytest.mark.parametrize("name", ML_DTYPES)
def test_rounding_is_that_of_ml_dtypes(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numpy = pytest.importorskip("numpy")
    element, x = ELEMENTS[name], probes(name)
    inside = x.clamp(-element.largest, element.largest)  # their casts differ in whether they saturate; ours does
    theirs = inside.numpy().astype(getattr(ml_dtypes, ML_DTYPES[name])).view(numpy.uint8)
    assert torch.equal(element.codes(x), torch.from_numpy(theirs))


@pytest.mark.parametrize("name", ELEMENTS)
def test_codes_are_the_nearest_elements_ties_to_even(name):
    element, x = ELEMENTS[name], probes(name)
    usable = (element.table.isfinite() & (element.table.abs() <= element.largest)).nonzero()[:, 0]
    codes = element.codes(x).long()
    distance = (element.table[usable].double() - x.double()[:, None]).abs()
    nearest = distance.min(1).values
    assert torch.equal((element.table[codes].double() - x.double()).abs(), nearest)
    values = element.table[usable]
    ties = ((distance == nearest[:, None]) & (values != 0)).sum(1) > 1
    assert ties.sum() > 2 and (codes[ties] % 2 == 0).all()
    assert (codes[x >= element.largest] == element.codes(torch.tensor([element.largest])).item()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ELEMENTS)
def test_blocks_decode_to_the_nearest_multiple_of_the_specification_s_scale(name, dtype):
    """Section 6.3 by brute force in float64: X = 2**(floor(log2(max)) - emax) and the nearest P to every x / X."""
    element = ELEMENTS[name]
    table = element.table[element.table.isfinite() & (element.table.abs() <= element.largest)].double()
    generator = torch.Generator().manual_seed(1)
    for block in (8, 16, 32):
        x = (torch.randn(5 * block + 3, generator=generator) * torch.rand(1, generator=generator) * 40).to(dtype)
        y = through(Microscaling(name, block), x)
        for ours, values in zip(y.split(block), x.double().split(block), strict=True):
            scale = 2.0 ** (math.floor(math.log2(values.abs().max())) - element.emax)
            distance = (table * scale - values[:, None]).abs()
            error = (ours.double() - values).abs()
            rounding = values.abs() * torch.finfo(dtype).eps
            assert (error <= distance.min(1).values + rounding).all()


@pytest.mark.parametrize("name", ELEMENTS)
def test_blocks_of_extremes_stay_within_bounds(name):
    element = ELEMENTS[name]
    for dtype in DTYPES:
        limits = torch.finfo(dtype)
        for value in (limits.max, limits.min, limits.tiny, 0.0, -0.0):
            x = torch.full((35,), value, dtype=dtype)
            y = through(Microscaling(name, 32), x)
            assert y.isfinite().all()
            allowed = abs(value) * (1 - element.largest / 2 ** (element.emax + 1)) + limits.smallest_normal * 2.0**-2
            assert ((y.double() - value).abs() <= allowed).all()
    denormal = torch.tensor([2.0**-140] * 8)  # the smallest scale is 2**-127
    error = (through(Microscaling(name, 8), denormal) - denormal).abs()
    assert (error.double() <= element.table[1].item() * 2.0**-128).all()
    assert (through(Microscaling(name, 8), torch.zeros(20)) == 0).all()


def test_powers_of_two_are_exact_from_one_end_of_float32_to_the_other():
    for name in ELEMENTS:
        for exponent in (-126, -100, -1, 0, 1, 100, 127):
            x = torch.full((9,), 2.0**exponent)
            assert torch.equal(through(Microscaling(name, 8), x), x), f"{name} 2**{exponent}"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_value_becomes_the_scale_ff_and_its_block_nan(dtype, bad):
    codec = Microscaling("e2m1", 16)
    x = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(dtype)
    good = through(codec, x)
    x[20] = bad
    payload = codec.encode(x)
    scales = payload[codec.wire_bytes(40) - 16 :][:3]
    assert scales[1] == 0xFF and scales[0] != 0xFF and scales[2] != 0xFF
    y = through(codec, x)
    assert y[16:32].isnan().all()
    assert torch.equal(y[:16], good[:16]) and torch.equal(y[32:], good[32:])


def test_the_payload_of_a_small_block_byte_by_byte():
    """max 6 -> floor(log2) 2 -> X = 2**(2 - 2) = 1: the codes are those of E2M1 itself, byte 127 is the scale."""
    payload = Microscaling("e2m1", 8).encode(torch.tensor([0.0, 0.5, 1.0, 1.5, -2.0, 3.0, -4.0, 6.0]))
    assert payload[:4].tolist() == [0x10, 0x32, 0x5C, 0x7E] and payload[16] == 127 and len(payload) == 32


@pytest.mark.parametrize(("recipe", "bits", "bits_per_value"), [("mx", 4, 4.25), ("mx", 5, 5.25), ("mx-int", 3, 3.25)])
def test_payloads_have_the_formats_bits(recipe, bits, bits_per_value):
    legs = Config(bits=bits, recipe=recipe).legs
    assert legs.reduce.wire_bytes(8192) * 8 / 8192 == bits_per_value
    narrow = Config(bits=bits, recipe=recipe, block=8).legs
    assert narrow.reduce.wire_bytes(8192) * 8 / 8192 == bits + 1


def test_every_width_of_the_three_recipes_has_an_element_of_that_width():
    from flashcomm_megatron.codec.recipes import RECIPES

    used = set()
    for recipe in ("mx", "mx-wide", "mx-int"):
        for bits in RECIPES[recipe].widths:
            codec = Config(bits=bits, recipe=recipe).legs.reduce
            assert ELEMENTS[codec.element].bits == bits
            used.add(codec.element)
    assert used == set(ELEMENTS)


def test_blocks_that_the_format_does_not_have_are_refused():
    with pytest.raises(ValueError, match="block=64: choose 8, 16 or 32"):
        Microscaling("e2m1", 64)
    with pytest.raises(ValueError, match="--flash-comm-block=64: choose 8, 16 or 32"):
        Config(bits=4, recipe="mx", block=64)


@pytest.mark.parametrize(("world", "recipe", "bits"), [(2, "mx", 5), (3, "mx-int", 3)])
def test_collectives_equal_their_specification_on_every_rank(world, recipe, bits):
    config = Config(bits=bits, recipe=recipe, min_bytes=0, block=16)
    assert spawn(every_collective, world, [config]) == [len(SHAPES) * 3] * world
