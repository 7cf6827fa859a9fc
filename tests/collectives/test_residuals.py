"""What the collectives do with residuals: roundings do not add up, and simulated ranks are real ranks."""

from __future__ import annotations

import pytest
import torch
from ranks import spawn
from specification import planned, simulate
from torch import Tensor

from flashcomm_megatron.codec import Rotated, rotated
from flashcomm_megatron.collectives import all_reduce, reduce_scatter
from flashcomm_megatron.collectives.algorithms import Residuals
from flashcomm_megatron.collectives.plan import Plan
from flashcomm_megatron.config import Config

AUTO = Config(bits=4, min_bytes=0)


def contribution(rank: int, step: int, shape: tuple[int, ...] = (6, 160)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + rank))


def drift(world: int, algorithm: str, steps: int, residuals: list[Residuals | None]) -> tuple[Tensor, Tensor, Plan]:
    """Sum of ``steps`` simulated all-reduces, the exact one, and the plan."""
    config = Config(bits=4, min_bytes=0, algorithm=algorithm)
    plans = [planned("all_reduce", contribution(0, 0), world, config, rank) for rank in range(world)]
    stream = exact = torch.zeros(6, 160)
    for step in range(steps):
        parts = [contribution(rank, step) for rank in range(world)]
        exact = exact + sum(parts)
        stream = stream + simulate(plans, parts, parts, residuals)[0]
    return stream, exact, plans[0]


def drifted(world: int, algorithm: str, steps: int, with_residuals: bool) -> float:
    """Squared error of :func:`drift` in the mean."""
    residuals = [Residuals() if with_residuals else None for _ in range(world)]
    stream, exact, _ = drift(world, algorithm, steps, residuals)
    return (stream - exact).square().mean().item()


@pytest.mark.parametrize(("world", "algorithm"), [(2, "one-step"), (3, "two-step"), (8, "two-step")])
def test_roundings_do_not_add_up(world: int, algorithm: str) -> None:
    once = drifted(world, algorithm, 1, with_residuals=False)
    without = drifted(world, algorithm, 16, with_residuals=False)
    kept = drifted(world, algorithm, 16, with_residuals=True)
    assert without > 10 * once
    assert kept < 2 * once


def _real(rank: int, world: int, algorithm: str) -> list[Tensor]:
    """The stream after each of three all-reduces with feedback, on real ranks."""
    config = Config(bits=4, min_bytes=0, algorithm=algorithm)
    stream, residuals, streams = torch.zeros(6, 160), Residuals(), []
    for step in range(3):
        stream = stream + all_reduce(contribution(rank, step), None, config, residuals=residuals)
        streams.append(stream)
    return streams


@pytest.mark.parametrize("algorithm", ["one-step", "two-step"])
def test_simulated_ranks_are_real_ranks(algorithm: str) -> None:
    expected = [drift(3, algorithm, steps, [Residuals() for _ in range(3)])[0] for steps in (1, 2, 3)]
    for streams in spawn(_real, 3, algorithm):
        assert all(torch.equal(found, wanted) for found, wanted in zip(streams, expected, strict=True))


def lacking(codec: Rotated, residuals: Tensor, width: int) -> Tensor:
    """The values that a leg's residuals of rows of ``width`` stand for."""
    codec = codec.fitted(width)
    blocks = -(-width // codec.block)
    numbers = rotated._ungrouped(residuals, codec.block, blocks) / codec.block
    return rotated.butterflies(numbers).view(-1, blocks * codec.block)[:, :width]


@pytest.mark.parametrize(("world", "algorithm"), [(2, "one-step"), (3, "two-step")])
def test_what_the_stream_lacks_is_what_the_ranks_keep(world: int, algorithm: str) -> None:
    """Of the reduce leg the residuals of all ranks, of the gather leg that of each slice's owner."""
    residuals = [Residuals() for _ in range(world)]
    stream, exact, plan = drift(world, algorithm, 8, residuals)
    missing = sum(lacking(plan.reduce, each.kept[0, "reduce"], stream.size(1)) for each in residuals)
    if algorithm == "two-step":
        missing += torch.cat([lacking(plan.gather, each.kept[0, "gather"], stream.size(1)) for each in residuals])
    assert missing.abs().max() > 0.1
    assert torch.allclose(stream + missing.view_as(stream), exact, atol=1e-4)


def test_a_codec_without_residuals_is_refused() -> None:
    plan = planned("all_reduce", contribution(0, 0), 2, Config(bits=4, min_bytes=0, recipe="flash-v1"))
    parts = [contribution(0, 0) for _ in range(2)]
    with pytest.raises(ValueError, match="only codecs of recipe auto"):
        simulate([plan] * 2, parts, parts, [Residuals(), Residuals()])


def test_residuals_of_another_shape_are_refused() -> None:
    residuals = [Residuals() for _ in range(2)]
    drift(2, "one-step", 1, residuals)
    parts = [torch.zeros(4096), torch.zeros(4096)]
    plan = planned("all_reduce", parts[0], 2, AUTO)
    with pytest.raises(ValueError, match=r"reduce leg remembers \d+ numbers, this tensor takes 4096; start with new"):
        simulate([plan] * 2, parts, parts, residuals)


def _scattered(rank: int, world: int) -> tuple[float, float]:
    """Squared error of a stream of reduce-scattered sums, without and with residuals."""
    errors = []
    for residuals in (None, Residuals()):
        stream = exact = torch.zeros(4, 160)
        for step in range(12):
            parts = [contribution(each, step, (8, 160)) for each in range(world)]
            stream = stream + reduce_scatter(parts[rank], None, AUTO, residuals=residuals)
            exact = exact + sum(parts).chunk(world)[rank]
        errors.append((stream - exact).square().mean().item())
    return errors[0], errors[1]


def test_reduce_scatter_keeps_residuals_of_the_whole_partial_sum() -> None:
    for without, kept in spawn(_scattered, 2):
        assert kept < 0.2 * without
