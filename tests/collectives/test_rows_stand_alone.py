"""A row of a collective depends on that row alone: not on how many others there are, nor on what they hold.

Simulated ranks run the algorithms that real ranks run. Rows of every kind of data stand side by side; each must come
out with the bits that it has by itself, and so must the residuals it leaves to a second call.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from codec_cases import KINDS, same, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import spawn
from specification import CALL
from torch import Tensor

from flashcomm_megatron.codec.published.outlier import from_ranges
from flashcomm_megatron.codec.recipes import RECIPES
from flashcomm_megatron.collectives import ALGORITHMS, all_reduce, alltoall, output, plan
from flashcomm_megatron.collectives.algorithms import Residuals
from flashcomm_megatron.comm import simulated
from flashcomm_megatron.comm.simulated import Simulated
from flashcomm_megatron.config import Config

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COLLECTIVES = ("one-step", "two-step", "hierarchical", "reduce_scatter", "all_gather", "all_to_all")
FORMATS = [(name, bits) for name, recipe in RECIPES.items() for bits in recipe.widths]
LAYOUTS = {4: [(0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)], 6: [(0, 0, 1, 1, 2, 2), (0, 1, 1, 2, 2, 0)]}
LAYOUTS[8] = [(0, 0, 0, 0, 1, 1, 1, 1), (0, 1, 2, 3, 3, 2, 1, 0)]
WIDTHS = (1, 33, 64, 80, 96, 100, 130, 160, 576, 960, 2112, 2880)


class Case:
    """One collective over ``world`` ranks: what is drawn."""

    def __init__(self, collective: str, recipe: str, bits: int, width: int, world: int, nodes: tuple[int, ...]) -> None:
        is_flat = collective in ("one-step", "two-step", "hierarchical")
        self.kind = "all_reduce" if is_flat else collective
        self.world, self.nodes, self.width = world, nodes, width
        calibrated = RECIPES[recipe].calibrated
        self.config = Config(
            bits=bits, recipe=recipe, min_bytes=0, algorithm=collective if is_flat else "auto",
            calibration="ranges" if calibrated else None,
        )  # fmt: skip
        self.legs = [self.config.legs] * world
        if calibrated:
            reach = torch.linspace(0.5, 4.0, width).repeat(world, 1)
            self.legs = [each._replace(reduce=from_ranges(-reach, reach, n)) for n, each in enumerate(self.legs)]
        self.keeps = RECIPES[recipe].feedback and self.kind in ("all_reduce", "reduce_scatter")

    def shape(self, x: Tensor) -> Tensor:
        """[rows, ranks or 1, width] as the collective takes it: rows last of a rank's slice, first of a tensor."""
        return x.transpose(0, 1).reshape(-1, self.width)

    def run(self, parts: list[Tensor], residuals: list[Residuals] | None) -> list[Tensor]:
        """Result of every rank, [ranks or 1, rows, width]: slice by slice."""
        rows = parts[0].size(0)
        inputs = [self.shape(part).clone() for part in parts]

        def start(comm: Simulated) -> Any:
            x = inputs[comm.rank]
            taken = x.shape if self.kind != "all_to_all" else x.shape[1:]
            made = plan.plan(self.kind, taken, x.dtype, x.device, comm, self.config, legs=self.legs[comm.rank])
            if self.kind == "all_to_all":
                return exchange(x, made)
            out = x if self.kind == "all_reduce" else output(self.kind, x, self.world)
            return ALGORITHMS[made.algorithm](x, out, made, CALL, residuals and residuals[comm.rank])

        found = simulated.run(start, self.world, self.nodes)
        return [each.view(-1, rows, self.width) for each in found]


def exchange(x: Tensor, made: plan.Plan) -> Any:
    """An all-to-all of as many rows to each rank; what stays on a rank is not sent."""
    out = torch.empty_like(x)
    outgoing, incoming = ([each.view(-1) for each in t.chunk(made.comm.world)] for t in (x, out))
    away = [rank != made.comm.rank for rank in range(made.comm.world)]
    sizes = [alltoall._size(each, made, x.size(-1)) * is_sent for each, is_sent in zip(outgoing, away, strict=True)]
    return alltoall._steps(out, outgoing, incoming, (sizes, sizes), made, CALL)


def rows_of_every_kind(case: Case, kinds: list[str], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Of every rank [rows, slices, width]."""
    slices = case.world if case.kind in ("reduce_scatter", "all_to_all") else 1
    return [
        torch.stack(
            [
                torch.stack([tensor(kind, case.width, dtype, 1000 * seed + 10 * rank + n) for n in range(slices)])
                for kind in kinds
            ]
        )
        for rank in range(case.world)
    ]


def check(case: Case, kinds: list[str], dtype: torch.dtype, alone: int, calls: int = 2) -> None:
    """Row ``alone`` has the bits that it has without the others, in two calls, with residuals where there are some."""
    together, single = ([Residuals() for _ in range(case.world)] if case.keeps and calls == 2 else None for _ in "12")
    for call in range(calls):
        parts = rows_of_every_kind(case, kinds, dtype, call)
        expected = case.run([part[alone : alone + 1] for part in parts], single)
        found = case.run(parts, together)
        for rank, (one, all_rows) in enumerate(zip(expected, found, strict=True)):
            assert same(all_rows[:, alone], one[:, 0]), f"{case.config} call {call} rank {rank}: {len(kinds)} rows"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    collective, (recipe, bits) = draw(st.sampled_from(COLLECTIVES)), draw(st.sampled_from(FORMATS))
    width = draw(st.one_of(st.sampled_from(WIDTHS), st.integers(1, 300)))
    if RECIPES[recipe].calibrated:  # knows all-reduce and reduce-scatter alone, rows of a site's features
        collective, width = draw(st.sampled_from(("one-step", "reduce_scatter"))), max(width // 32, 1) * 32
    if collective == "hierarchical":
        world = draw(st.sampled_from(sorted(LAYOUTS)))
        return Case(collective, recipe, bits, width, world, draw(st.sampled_from(LAYOUTS[world])))
    return Case(collective, recipe, bits, width, draw(st.integers(2, 8)), ())


@settings(max_examples=200, deadline=None)
@given(
    case=cases(),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=9),
    dtype=st.sampled_from(DTYPES),
    row=st.integers(0, 8),
    piece=st.sampled_from([0, 1, 3]),
    calls=st.integers(1, 2),
)
def test_a_row_alone_is_a_row_among_others(
    case: Case, kinds: list[str], dtype: torch.dtype, row: int, piece: int, calls: int
) -> None:
    """``piece``: rows of a piece; 0: whole tensors. ``calls``: 2 with residuals, where the recipe keeps them."""
    with mock.patch.object(plan, "PIECE", {"shared memory": piece * case.width}):
        check(case, kinds, dtype, row % len(kinds), calls)


@pytest.mark.parametrize("nodes", [(0, 0, 1, 1, 2, 2), (0, 1, 1, 2, 2, 0), (0, 1, 2, 2, 0, 1)])
def test_the_sum_over_machines_has_one_order(nodes: tuple[int, ...]) -> None:
    """Machines hold 1e8, -1e8 and 1: that ranks come in another order in each slice must not be noticed."""
    case = Case("hierarchical", "auto", 4, 64, 6, nodes)
    parts = [torch.full((6, 1, 64), value / 2) for value in (1e8, -1e8, 1.0)]
    found = case.run([parts[node] for node in nodes], None)
    assert all(torch.equal(each, found[0][:, :1].expand_as(each)) for each in found)


@pytest.mark.parametrize("width", [2880, 4096, 8192])
def test_one_row_is_cut_where_super_blocks_end(width: int) -> None:
    """Values of every magnitude in one row: the scales of a super-block count down from its largest."""
    check(Case("two-step", "auto", 4, width, 8, ()), ["octaves", "normal"], torch.float32, 0)


def real(rank: int, world: int, transport: str) -> None:
    config = Config(bits=4, min_bytes=0, transport=transport)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(rank)).bfloat16()
    together = all_reduce(x.clone(), None, config)
    for first, last in ((0, 1), (3, 9)):
        assert torch.equal(all_reduce(x[first:last].clone(), None, config), together[first:last])


@pytest.mark.parametrize("transport", ["shared-memory", "group"])
def test_rows_of_real_ranks_stand_alone(transport: str) -> None:
    spawn(real, 3, transport)
