"""Several machines: exact inside, quantized between; any number of ranks on each. Pieces that are under way at once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch import Tensor

from flashcomm_megatron.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    REDUCE_SCATTER,
    algorithms,
    all_gather,
    all_reduce,
    hierarchical,
    hierarchical_halves,
    pieces,
    reduce_scatter,
)
from flashcomm_megatron.collectives import plan as policy
from flashcomm_megatron.comm import segment
from flashcomm_megatron.comm import simulated as lockstep
from flashcomm_megatron.comm.wire import Wire
from flashcomm_megatron.config import Config
from flashcomm_megatron.observe import counters

LAYOUTS = [(0, 0, 1, 1), (0, 0, 0, 1), (0, 1, 1, 2, 2, 2), (0, 1, 0, 1), (0, 0, 0, 1, 1)]


def part(rank: int, numel: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


def planned(
    numel: int, nodes: tuple[int, ...], piece: int | None = None, kind: str = "all_reduce", **options: object
) -> policy.Plan:
    config = Config(bits=4, min_bytes=0, **options)
    plan = policy.plan(kind, part(0, numel), len(nodes), config, wire=Wire("connections", nodes))
    return plan if piece is None else plan._replace(piece=piece)


def reduced(plan: policy.Plan, parts: list[Tensor]) -> list[Tensor]:
    algorithm, _ = ALL_REDUCE[plan.algorithm]
    copies = [each.clone() for each in parts]
    return lockstep.run(lambda link: algorithm(copies[link.rank], link, plan), len(parts))


@pytest.mark.parametrize("numel", [1, 63, 1000, 5000])
@pytest.mark.parametrize("nodes", LAYOUTS)
def test_the_sum_is_that_of_the_machines_exact_sums(nodes: tuple[int, ...], numel: int) -> None:
    plan = planned(numel, nodes)
    assert plan.algorithm == "hierarchical"
    parts = [part(rank, numel) for rank in range(len(nodes))]
    results = reduced(plan, parts)
    assert all(torch.equal(each, results[0]) for each in results), "all ranks hold the same bits"
    machines = sorted(set(nodes))
    sums = [sum(p.float() for p, n in zip(parts, nodes, strict=True) if n == each) for each in machines]
    here = hierarchical.layout(numel, plan)
    for number in range(here.slices):
        span = here.span(number, number)
        if span.stop == span.start:
            continue
        flat = plan._replace(nodes=(), algorithm="one-step" if len(machines) == 2 else "two-step")
        expected = reduced(flat, [each[span].clone() for each in sums])[0].to(parts[0].dtype)
        assert torch.equal(results[0][span], expected)


@pytest.mark.parametrize("numel", [1, 63, 1000, 5000])
@pytest.mark.parametrize("nodes", LAYOUTS)
def test_a_slice_is_the_sum_of_the_machines_quantized_sums(nodes: tuple[int, ...], numel: int) -> None:
    world = len(nodes)
    plan = planned(numel, nodes, kind="reduce_scatter", piece=2048)
    assert plan.algorithm == "hierarchical"
    parts = [part(rank, world * numel) for rank in range(world)]
    results = lockstep.run(
        lambda link: hierarchical_halves.reduce_scatter(
            parts[link.rank], parts[0].new_full((numel,), torch.nan), link, plan
        ),
        world,
    )
    sums = [sum(p.float() for p, n in zip(parts, nodes, strict=True) if n == each) for each in sorted(set(nodes))]
    for rank, result in enumerate(results):
        for first, last in pieces.cuts(numel, plan.piece):
            payloads = [plan.reduce.encode(each.chunk(world)[rank][first:last].contiguous()) for each in sums]
            expected = plan.reduce.decode_sum(payloads, torch.empty(last - first, dtype=torch.bfloat16))
            assert torch.equal(result[first:last], expected)


@pytest.mark.parametrize("numel", [1, 63, 1000, 5000])
@pytest.mark.parametrize("nodes", LAYOUTS)
def test_gathered_over_machines_are_the_bits_of_the_flat_gather(nodes: tuple[int, ...], numel: int) -> None:
    world = len(nodes)
    plan = planned(numel, nodes, kind="all_gather", piece=2048)
    assert plan.algorithm == "hierarchical"
    results = {
        gather: lockstep.run(
            lambda link: gather(part(link.rank, numel), torch.empty(world * numel), link, plan),  # noqa: B023
            world,
        )
        for gather in (hierarchical_halves.all_gather, algorithms.all_gather)
    }
    flat, *_ = results[algorithms.all_gather]
    assert all(torch.equal(each, flat) for each in results[hierarchical_halves.all_gather])


def half(kind: str, link, numel: int, plan: policy.Plan):  # type: ignore[no-untyped-def]
    """One rank's reduce_scatter or all_gather with slices of ``numel`` values."""
    if kind == "all_gather":
        return hierarchical_halves.all_gather(part(link.rank, numel), torch.empty(numel * link.world), link, plan)
    x = part(link.rank, numel * link.world)
    return hierarchical_halves.reduce_scatter(x, torch.empty(numel), link, plan)


@pytest.mark.parametrize("kind", ["reduce_scatter", "all_gather"])
@pytest.mark.parametrize("nodes", LAYOUTS)
def test_bytes_of_the_halves_are_those_sent(nodes: tuple[int, ...], kind: str) -> None:
    numel, world = 5000, len(nodes)
    plan, sent, far = planned(numel, nodes, kind=kind, piece=2048), [0] * world, [0] * world

    def start(link):  # type: ignore[no-untyped-def]
        def exchange(sends, receives):  # type: ignore[no-untyped-def]
            for to, each in enumerate(sends):
                sent[link.rank] += each.numel() * (to != link.rank)
                far[link.rank] += each.numel() * (nodes[to] != nodes[link.rank])
            return link.exchange(sends, receives)

        return half(kind, link._replace(exchange=exchange), numel, plan)

    lockstep.run(start, world)
    _, count = {"reduce_scatter": REDUCE_SCATTER, "all_gather": ALL_GATHER}[kind]["hierarchical"]
    assert sent == [count(numel, rank, world, plan) for rank in range(world)]
    codec = plan.reduce if kind == "reduce_scatter" else plan.gather
    once = world * (len(set(nodes)) - 1) * algorithms.wire_bytes(codec, numel, plan.piece)
    assert sum(far) == once, "each machine hears of each slice of another once"


@pytest.mark.parametrize("nodes", LAYOUTS)
def test_counted_bytes_are_those_sent(nodes: tuple[int, ...]) -> None:
    numel = 5000
    plan, sent = planned(numel, nodes, piece=2048), {}

    def start(link):  # type: ignore[no-untyped-def]
        near = far = 0

        def exchange(sends, receives):  # type: ignore[no-untyped-def]
            nonlocal near, far
            for to, each in enumerate(sends):
                if to != link.rank:
                    near += each.numel() * (nodes[to] == nodes[link.rank])
                    far += each.numel() * (nodes[to] != nodes[link.rank])
            sent[link.rank] = near, far
            return link.exchange(sends, receives)

        return hierarchical.hierarchical(part(link.rank, numel), link._replace(exchange=exchange), plan)

    lockstep.run(start, len(nodes))
    assert sent == {r: hierarchical.bytes_by_distance(numel, r, plan) for r in range(len(nodes))}


def test_one_machine_or_one_rank_on_each_needs_no_hierarchy() -> None:
    assert planned(1000, (0, 0, 0, 0)).algorithm == "two-step"
    assert planned(1000, (0, 1, 2, 3)).algorithm == "two-step"
    assert planned(1000, (0, 0, 1, 1), algorithm="two-step").algorithm == "two-step"


# ---- pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one-step", "two-step"])
def test_pieces_are_the_all_reduce_of_each(kind: str) -> None:
    numel, piece = 5000, 2048
    plan = planned(numel, (0, 0, 0), piece=piece, algorithm=kind)
    parts = [part(rank, numel) for rank in range(3)]
    expected = torch.cat(
        [reduced(plan._replace(piece=0), [p[a:b].clone() for p in parts])[0] for a, b in pieces.cuts(numel, piece)]
    )
    assert torch.equal(reduced(plan, parts)[0], expected)
    algorithm_bytes = {"one-step": algorithms.one_step_bytes, "two-step": algorithms.two_step_bytes}[kind]
    whole = plan._replace(piece=0)
    for rank in range(3):
        cut = sum(algorithm_bytes(b - a, rank, 3, whole) for a, b in pieces.cuts(numel, piece))
        assert algorithm_bytes(numel, rank, 3, plan) == cut


def test_all_pieces_are_posted_before_the_first_is_awaited() -> None:
    events: list[str] = []

    def piece(number: int) -> algorithms.Going:
        events.append(f"post {number}")
        yield []
        events.append(f"decode {number}")

    list(pieces.together(piece(number) for number in range(3)))
    assert events == ["post 0", "post 1", "post 2", "decode 0", "decode 1", "decode 2"]


def test_pieces_do_not_change_what_is_gathered() -> None:
    """A second gather, started differently, has to bring the bits of the first."""
    plan = planned(5000, (0, 0))
    cut = plan._replace(piece=2048)
    outs = []
    for each in (plan, cut):
        start = lambda link: algorithms.all_gather(part(link.rank, 5000), torch.empty(10_000), link, each)  # noqa: B023, E731
        outs.append(lockstep.run(start, 2)[1])
    assert torch.equal(*outs)


def test_plans_cut_where_families_of_blocks_end() -> None:
    for options in ({}, {"block": 64}, {"recipe": "flash-v1"}, {"recipe": "mx"}):
        plan = planned(8, (0, 0), **options)
        assert plan.piece > 0 and plan.piece % (32 * plan.reduce.block) == plan.piece % plan.gather.block == 0


# ---- real ranks -------------------------------------------------------------------------------------------------


def two_machines(rank: int, world: int) -> tuple[Tensor, dict]:
    segment.machine = lambda: f"machine {rank // 2}"
    counters.reset_stats()
    x = part(rank, 1_200_000)
    result = all_reduce(x.clone(), None, Config(bits=4, min_bytes=0))
    plan = planned(x.numel(), (0, 0, 1, 1))
    everyone = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(everyone, x)
    assert torch.equal(result, reduced(plan, everyone)[rank]), "the simulated ranks say the same"
    counted = counters.stats()
    inside, between = hierarchical.bytes_by_distance(x.numel(), rank, plan)
    assert counted["remote_bytes"] == between and counted["wire_bytes"] == inside + between
    for kind, call, table in (
        ("reduce_scatter", reduce_scatter, REDUCE_SCATTER),
        ("all_gather", all_gather, ALL_GATHER),
    ):
        counters.reset_stats()
        halves = [x[: 4 * 4096] if kind == "reduce_scatter" else x[:4096] for x in everyone]
        found = call(halves[rank], None, Config(bits=4, min_bytes=0))
        plan = planned(halves[rank].numel(), (0, 0, 1, 1), kind=kind)
        algorithm, count = table["hierarchical"]
        simulated = lockstep.run(
            lambda link: algorithm(halves[link.rank], torch.empty_like(found), link, plan),  # noqa: B023
            world,
        )
        assert torch.equal(found, simulated[rank])
        assert counters.stats()["wire_bytes"] == count(4096, rank, world, plan)
    return result, counted


def test_two_machines_with_two_ranks_each() -> None:
    results = spawn(two_machines, 4)
    assert all(torch.equal(result, results[0][0]) for result, _ in results)
