"""A row of a sum depends on that row alone: not on how many others there are, nor on what they hold."""

from __future__ import annotations

import pytest
import torch
from ranks import spawn
from specification import planned, simulate
from torch import Tensor

from flashcomm_megatron.collectives import all_reduce, plan
from flashcomm_megatron.config import Config

RECIPES = [("auto", 4), ("flash-v1", 4), ("flash-v2", 3), ("mx", 4)]
WIDTHS = [64, 96, 160, 4096]


def rows(rank: int, count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(rank)).bfloat16()


def summed(parts: list[Tensor], config: Config) -> Tensor:
    plans = [planned("all_reduce", parts[0], len(parts), config, rank) for rank in range(len(parts))]
    copies = [part.clone() for part in parts]
    return simulate(plans, copies, copies)[0]


@pytest.mark.parametrize("algorithm", ["one-step", "two-step"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("recipe", "bits"), RECIPES)
def test_a_row_alone_is_a_row_among_others(
    recipe: str, bits: int, width: int, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "PIECE", {"shared memory": 3 * width})
    config = Config(bits=bits, recipe=recipe, min_bytes=0, algorithm=algorithm)
    parts = [rows(rank, 11, width) for rank in range(3)]
    together = summed(parts, config)
    for first, last in ((0, 1), (4, 5), (2, 9)):
        assert torch.equal(summed([part[first:last] for part in parts], config), together[first:last])


def real(rank: int, world: int, transport: str) -> None:
    config = Config(bits=4, min_bytes=0, transport=transport)
    x = rows(rank, 9, 256)
    together = all_reduce(x.clone(), None, config)
    for first, last in ((0, 1), (3, 9)):
        assert torch.equal(all_reduce(x[first:last].clone(), None, config), together[first:last])


@pytest.mark.parametrize("transport", ["shared-memory", "group"])
def test_rows_of_real_ranks_stand_alone(transport: str) -> None:
    spawn(real, 3, transport)
