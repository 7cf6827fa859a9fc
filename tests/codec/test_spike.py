"""Spike reserving: exact spikes, the analytic bound on the rest, the documented bits per value, every odd block."""

from __future__ import annotations

import math
import re

import pytest
import torch
from every_collective import DTYPES, SHAPES, every_collective
from ranks import spawn

from flashcomm_megatron.codec import Spike, spike
from flashcomm_megatron.config import Config

WIDTHS = range(2, 9)
BLOCKS = [8, 24, 32, 64, 256]


def through(codec: Spike, x: torch.Tensor) -> torch.Tensor:
    """decode(encode(x)) in x's dtype."""
    payload = codec.encode(x)
    assert payload.numel() == codec.wire_bytes(x.numel())
    return codec.decode_sum([payload], torch.empty_like(x))


def samples(dtype: torch.dtype, numel: int, seed: int) -> dict[str, torch.Tensor]:
    """Tensors of very different character, the catastrophic ones included."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(numel, generator=generator)
    limits = torch.finfo(dtype)
    cases = {
        "normal": normal,
        "outliers": normal * torch.where(torch.rand(numel, generator=generator) < 0.02, 1000.0, 1.0),
        "skewed": normal.exp(),
        "far from zero": 5 + 0.1 * normal,
        "far from its spikes": torch.where(torch.arange(numel) % 8 == 0, -0.5, -100 + normal),
        "mixed magnitudes": normal * torch.exp(8 * torch.randn(numel, generator=generator)),
        "tiny": normal * limits.tiny * 0.1,
        "huge": normal.clamp(-3, 3) / 3 * limits.max,
        "ties": normal.round(),
        "zeros": normal * 0,
    }
    return {name: x.clamp(limits.min, limits.max).to(dtype) for name, x in cases.items()}


def bound(x: torch.Tensor, block: int, levels: int) -> torch.Tensor:
    """Largest error allowed of each value, in float64, from the module docstring; computed by sorting each block."""
    allowed = torch.empty(x.numel(), dtype=torch.float64)
    for start in range(0, x.numel(), block):
        values = x[start : start + block].double()
        spikes = x[start : start + block].float().bfloat16().clamp(-3.38e38, 3.38e38).double()
        ordered = values.sort().values
        low, high = (ordered[1], ordered[-2]) if values.numel() > 2 else (ordered[0], ordered[0])
        least, most = spikes.min().item(), spikes.max().item()
        anchor = min(max(0.0, least), most)
        largest = max(abs(least), abs(most))
        floor = 2.0 ** (math.floor(math.log2(largest)) - 29) if largest else 0.0
        span = 9 / 8 * max(32 / 31 * (high - low), 32 / 159 * (high - anchor), (anchor - low) / 4, floor)
        allowed[start : start + block] = span / levels / 2
        ends = torch.stack([start + values.argmin(), start + values.argmax()])
        allowed[ends] = torch.maximum(allowed[ends], (x[ends].double() - x[ends].float().bfloat16().double()).abs())
        allowed[start : start + block] += largest * 2.0**-20 + 2.0**-133  # float32 arithmetic, bfloat16's last step
    return allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_error_is_within_the_bound(bits, dtype):
    step = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for block in BLOCKS:
        for name, x in samples(dtype, 4 * block + 13, seed=bits).items():
            y = through(Spike(bits, block), x)
            output_rounding = y.double().abs() * step + torch.finfo(dtype).smallest_normal * step
            excess = (y.double() - x.double()).abs() - bound(x, block, 2**bits - 1) - output_rounding
            assert excess.max() <= 0, f"{name}, block {block}: {excess.max():.3g} beyond the bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spikes_are_exact_to_bfloat16(dtype):
    for name, x in samples(dtype, 640, seed=3).items():
        y = through(Spike(2, 64), x).view(-1, 64)
        blocks = x.view(-1, 64)
        for spikes in (blocks.argmin(1, keepdim=True), blocks.argmax(1, keepdim=True)):
            largest = torch.finfo(torch.bfloat16).max
            wanted = blocks.gather(1, spikes).float().bfloat16().float().clamp(-largest, largest)
            limit = torch.finfo(dtype).max
            assert torch.equal(y.gather(1, spikes).float(), wanted.clamp(-limit, limit).to(dtype).float()), name


@pytest.mark.parametrize("bits", WIDTHS)
def test_constants_are_exact(bits):
    for dtype in DTYPES:
        limits = torch.finfo(dtype)
        for value in (0.0, 1 / 3, -1 / 3, 5.0, -1e-4, limits.max, limits.min, limits.tiny, -limits.tiny / 3, 1.0000001):
            for numel in (1, 2, 3, 63, 64, 130):
                x = torch.full((numel,), value, dtype=dtype)
                assert torch.equal(through(Spike(bits, 64), x), x), f"{value} x {numel} in {dtype}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_of_at_most_two_values_is_exact_to_bfloat16(dtype):
    for values in ([3.25], [-7.0, 1.5], [1.5, -7.0], [0.0, 1e-3]):
        x = torch.tensor([9.0] * 32 + values).to(torch.bfloat16).to(dtype)
        assert torch.equal(through(Spike(2, 32), x), x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_value_turns_its_block_and_no_other_into_nan(dtype, bad):
    x = samples(dtype, 200, seed=1)["normal"]
    for place in (0, 40, 63, 199):
        broken = x.clone()
        broken[place] = bad
        y = through(Spike(3, 32), broken)
        block = torch.arange(200) // 32 == place // 32
        assert y[block].isnan().all()
        assert torch.equal(y[~block], through(Spike(3, 32), x)[~block])


def test_outliers_do_not_cost_the_rest_of_their_block():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    spiked = x.clone()
    spiked[10], spiked[50] = 1000.0, -1000.0
    error = (through(Spike(4, 64), spiked) - spiked).abs()
    assert error.max() <= (x.max() - x.min()) * 1.2 / 15 / 2 * 1.01


def test_documented_bits_per_value_are_the_bits_on_the_wire():
    rows = re.findall(r"^ +block (\d+) +([\d. ]+)$", spike.__doc__ or "", re.MULTILINE)
    assert len(rows) == 3
    for block, widths in rows:
        numel = int(block) * 16 * 64  # every section is a multiple of 16 bytes
        for bits, documented in zip(WIDTHS, widths.split(), strict=True):
            assert Spike(bits, int(block)).wire_bytes(numel) * 8 / numel == pytest.approx(float(documented), abs=5e-5)
    assert Config(bits=2, recipe="flash-v2").legs.reduce.wire_bytes(65536) * 8 / 65536 < 3


def test_the_payload_of_a_small_block_byte_by_byte():
    """Values 0..7 times 1/4 with spikes -2 at position 3 and 8 at position 6: the wire as the docstring draws it."""
    x = torch.tensor([0.0, 0.25, 0.5, -2.0, 1.0, 1.25, 8.0, 1.75])
    payload = Spike(4, 8).encode(x)
    sections = payload.view(-1, 16)
    # E = 3. needed = 1.75 * 32 / 31 = 1.806 -> span 1.875 = (1 + 7/8) * 2**0: c >> 3 = 26, c & 7 = 7.
    # low = 0 + 0 * span / 32; steps of 0.125: codes 0 2 4 (0) 8 10 (0) 14.
    assert sections[0, :4].tolist() == [0x20, 0x04, 0xA8, 0xE0]
    assert sections[1, :2].tolist() == [0x00, 0xC0] and sections[2, :2].tolist() == [0x00, 0x41]
    assert sections[3, 0] == 26 << 3 | 7 and sections[4, 0] == 0
    assert sections[5, 0] == (3 & 3) | (6 & 3) << 2 and sections[6, 0] == (3 >> 2) | (6 >> 2) << 1
    assert len(sections) == 7 and torch.equal(Spike(4, 8).decode_sum([payload], torch.empty(8)), x)


def test_sums_run_in_float32_in_the_order_given():
    codec = Spike(5, 32)
    parts = [torch.randn(100, generator=torch.Generator().manual_seed(seed)).half() for seed in range(3)]
    alone = [codec.decode_sum([codec.encode(part)], torch.empty(100)) for part in parts]
    together = codec.decode_sum([codec.encode(part) for part in parts], torch.empty(100, dtype=torch.float16))
    assert torch.equal(together, ((alone[0] + alone[1]) + alone[2]).half())


def test_blocks_a_position_cannot_name_are_refused():
    with pytest.raises(ValueError, match="block=512: choose a multiple of 8 up to 256"):
        Spike(4, 512)


@pytest.mark.parametrize(("world", "bits"), [(2, 2), (3, 5)])
def test_collectives_equal_their_specification_on_every_rank(world, bits):
    config = Config(bits=bits, recipe="flash-v2", min_bytes=0)
    assert spawn(every_collective, world, [config]) == [len(SHAPES) * 3] * world
