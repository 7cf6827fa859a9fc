"""Calibrated outlier format: which features stay exact, static scales per rank, the bound, NaN, legs of one site."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from every_collective import DTYPES, part
from ranks import spawn

from flashcomm_megatron.codec import Outlier, Uncalibrated
from flashcomm_megatron.codec.published.outlier import from_ranges
from flashcomm_megatron.codec.recipes import Legs
from flashcomm_megatron.collectives import all_gather, all_reduce, reduce_scatter
from flashcomm_megatron.config import Config
from flashcomm_megatron.observe.counters import reset_stats, stats

FEATURES = 130


def calibrated(rank: int, ranks: int, features: int = FEATURES) -> Outlier:
    """A site whose features 5 and 77 are wide, calibrated on what :func:`activation` gives."""
    low = torch.full((ranks, features), -3.0) - torch.arange(ranks)[:, None]
    high = torch.linspace(2, 6, features).expand(ranks, -1).clone()
    high[:, 5], low[ranks - 1, 77] = 300.0, -500.0
    return from_ranges(low, high, rank)


def activation(rank: int, tokens: int, features: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return part(rank, (tokens, features), dtype, seed).clamp(-3, 2) * torch.where(torch.arange(features) == 5, 100, 1)


def by_hand(codec: Outlier, rank: int, x: torch.Tensor) -> torch.Tensor:
    """decode(encode(x)) of one rank in float64, from the method's definition; rows are tokens."""
    scales = codec.scales[rank].double()
    codes = (x.double() / scales).round().clamp(-7, 7)
    y = codes * scales
    y[:, codec.kept] = x.float().bfloat16().double()[:, codec.kept]
    return y


def test_the_widest_features_by_range_summed_over_ranks_stay_exact():
    low, high = torch.zeros(2, 128), torch.ones(2, 128)
    low[0, 100] = -9.0  # range 2 * 9 + 2 * 1 = 20
    high[:, 7] = 6.0  # range 2 * 6 + 2 * 6 = 24
    high[1, 50] = 10.5  # range 2 + 21 = 23
    first, second = from_ranges(low, high, 0), from_ranges(low, high, 1)
    assert first.kept.tolist() == second.kept.tolist() == [7, 50], "128 / 64 features, the same on all ranks"
    assert first.scales[0, 100] == torch.tensor(9.0) / 7 and first.scales[1, 50] == 1.5
    assert from_ranges(torch.zeros(2, 200), torch.ones(2, 200), 0).kept.tolist() == [0, 1, 2], "the first of equals"
    assert len(from_ranges(torch.zeros(2, 20), torch.ones(2, 20), 0).kept) == 1


def test_bits_per_value_are_4_and_three_sixteenths():
    codec = calibrated(0, 2, features=4096)
    assert codec.wire_bytes(4096 * 32) * 8 == 4096 * 32 * 4.1875


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_rank_s_payload_decodes_with_its_own_scales(rank, dtype):
    sender, receiver = calibrated(rank, 3), calibrated(1, 3)
    x = activation(rank, 7, FEATURES, dtype)
    payload = sender.encode(x.flatten())
    quiet = [calibrated(r, 3).encode(torch.zeros_like(x).flatten()) for r in range(3)]
    quiet[rank] = payload
    y = receiver.decode_sum(quiet, torch.empty(x.numel(), dtype=dtype)).view_as(x)
    wanted = by_hand(sender, rank, x)
    rounding = wanted.abs() * torch.finfo(dtype).eps
    assert ((y.double() - wanted).abs() <= rounding).all()
    error = (y.double() - x.double()).abs()
    rest = torch.ones(FEATURES, dtype=torch.bool).index_fill(0, sender.kept, False)
    assert (error <= sender.scales[rank] / 2 * (1 + 2.0**-20) + rounding)[:, rest].all()
    assert torch.equal(y[:, sender.kept].float(), x[:, sender.kept].float().bfloat16().to(dtype).float())


def test_values_beyond_the_calibrated_range_saturate():
    codec = calibrated(0, 1)
    x = torch.zeros(1, FEATURES)
    x[0, 10], x[0, 11], x[0, 5], x[0, 77] = 1e6, -1e6, 1e6, -1e6
    y = codec.decode_sum([codec.encode(x.flatten())], torch.empty(FEATURES))
    assert y[10] == 7 * codec.scales[0, 10] and y[11] == -7 * codec.scales[0, 11]
    assert y[5] == torch.tensor(1e6).bfloat16() and y[77] == torch.tensor(-1e6).bfloat16()
    assert (y != 0).sum() == 4


def test_catastrophic_outliers_cost_ten_times_less_than_in_per_tensor_static_int4():
    """Ranges as skewed as an independent replication found in a 12B model: three wide features, the worst 285 times."""
    generator, features, ranks = torch.Generator().manual_seed(0), 512, 8
    reach = torch.empty(features).uniform_(0.7, 1.3, generator=generator)
    reach[[40, 100, 300]] = torch.tensor([285.0, 60.0, 4.0])
    seen, fresh = (reach * (2 * torch.rand(ranks, 1024, features, generator=generator) - 1) for _ in range(2))
    low, high = seen.amin(1), seen.amax(1)
    codecs = [from_ranges(low, high, rank) for rank in range(ranks)]
    sent = [codec.encode(part.flatten()) for codec, part in zip(codecs, fresh, strict=True)]
    outlier = codecs[0].decode_sum(sent, torch.empty(fresh[0].numel())).view_as(fresh[0])
    scale = seen.abs().amax() / 7
    int4 = ((fresh / scale).round().clamp(-8, 7) * scale).sum(0)
    exact = fresh.double().sum(0)
    assert (int4 - exact).abs().max() > 10 * (outlier - exact).abs().max()


def test_a_feature_that_was_always_zero_decodes_to_zero():
    low, high = -torch.ones(1, 70), torch.ones(1, 70)
    low[0, 3], high[0, 3], high[0, 4], low[0, 4] = 0, 0, 1e-44, 0
    codec = from_ranges(low, high, 0)
    y = codec.decode_sum([codec.encode(torch.ones(70))], torch.empty(70))
    assert y[3] == y[4] == 0 and (y[5:] == 1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_value_decodes_to_nan_and_no_other_does(dtype, bad):
    codec = calibrated(0, 1)
    x = activation(0, 4, FEATURES, dtype)
    for place in ((1, 20), (3, 5), (0, 0), (3, 129)):
        broken = x.clone()
        broken[place] = bad
        y = codec.decode_sum([codec.encode(broken.flatten())], torch.empty(x.numel(), dtype=dtype)).view_as(x)
        assert y.isnan().nonzero().tolist() == [list(place)]


def test_what_does_not_fit_is_refused():
    codec = calibrated(0, 3)
    with pytest.raises(ValueError, match="expected tokens of 130 features, found 100 values"):
        codec.encode(torch.zeros(100))
    payload = codec.encode(torch.zeros(FEATURES))
    with pytest.raises(ValueError, match="one payload for each of 3 ranks, found 2"):
        codec.decode_sum([payload, payload], torch.empty(FEATURES))
    with pytest.raises(ValueError, match="calibrated sites only"):
        Uncalibrated().encode(torch.zeros(8))


def test_the_recipe_needs_its_file_and_no_other_recipe_takes_one():
    with pytest.raises(ValueError, match="--flash-comm-recipe outlier needs --flash-comm-calibration FILE"):
        Config(bits=4, recipe="outlier")
    with pytest.raises(ValueError, match="does nothing with recipe auto: add --flash-comm-recipe outlier"):
        Config(bits=4, calibration="ranges.safetensors")
    with pytest.raises(ValueError, match="--flash-comm-bits 5: choose 4 with recipe outlier"):
        Config(bits=5, recipe="outlier", calibration="ranges.safetensors")


def through(codec, x: torch.Tensor) -> torch.Tensor:
    """decode(encode(x)) of rows of FEATURES values."""
    return codec.decode_sum([codec.encode(x, width=FEATURES)], torch.empty_like(x), FEATURES)


def _one_site(rank: int, world: int, path: str) -> dict:
    """All collectives with the legs of a site; equal to their definition, and what is counted without legs."""
    reset_stats()
    for algorithm in ("auto", "two-step"):
        config = Config(bits=4, recipe="outlier", calibration=path, min_bytes=0, algorithm=algorithm)
        codec, gather = calibrated(rank, world), config.legs.gather
        legs = Legs(codec, gather)
        for dtype in DTYPES:
            parts = [activation(r, 6, FEATURES, dtype) for r in range(world)]
            sent = [calibrated(r, world).encode(x.flatten()) for r, x in enumerate(parts)]
            exact_sum = codec.decode_sum(sent, torch.empty(parts[0].numel(), dtype=dtype)).view(6, FEATURES)
            y = all_reduce(parts[rank].clone(), None, config, legs=legs)
            if algorithm == "auto":
                assert torch.equal(y, exact_sum), "one-step: the sum of the decoded parts"
            else:
                pieces = [through(gather, x) for x in _cut(exact_sum, world)]
                assert torch.equal(y, torch.cat(pieces).view_as(y)), "two-step: the same sums, rounded once more"
            everyone = [torch.empty_like(y) for _ in range(world)]
            dist.all_gather(everyone, y)
            assert all(torch.equal(y, each) for each in everyone)
            wide = parts[rank].repeat(world, 1)
            assert torch.equal(reduce_scatter(wide, None, config, legs=legs), exact_sum)
            gathered = [through(gather, x.flatten()) for x in parts]
            assert torch.equal(all_gather(parts[rank], None, config).flatten(), torch.cat(gathered).to(dtype))
    x = torch.ones(40, FEATURES)
    assert torch.equal(all_reduce(x, None, config), torch.full((40, FEATURES), float(world)))
    return stats()


def _cut(x: torch.Tensor, world: int) -> list[torch.Tensor]:
    unit = math.lcm(FEATURES, 128)
    return list(x.flatten().split(math.ceil(math.ceil(x.numel() / world) / unit) * unit))


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_at_a_site_equal_their_definition_and_elsewhere_stay_exact(world, tmp_path):
    for counted in spawn(_one_site, world, str(tmp_path / "ranges")):
        assert counted["quantized"] == 2 * len(DTYPES) * 3
        assert counted["deferred"] == {"no calibrated site": 1}
