"""Several machines: exact inside, quantized between. Pieces that are under way at once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from specification import CALL, on, planned, simulate
from torch import Tensor

from flashcomm_megatron.collectives import ALGORITHMS, algorithms, all_reduce, plan
from flashcomm_megatron.comm import shared_memory, simulated
from flashcomm_megatron.config import Config
from flashcomm_megatron.observe import counters

LAYOUTS = [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1, 1, 1), (0, 1, 2, 0, 1, 2)]
SHAPES = [(1,), (63,), (5, 200), (5000,)]


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def plans(shape: tuple[int, ...], nodes: tuple[int, ...], **options: object) -> list[plan.Plan]:
    """Of every rank."""
    config, world = Config(bits=4, min_bytes=0, **options), len(nodes)
    return [planned("all_reduce", part(0, shape), world, config, rank, nodes, "cpu") for rank in range(world)]


def reduced(made: list[plan.Plan], parts: list[Tensor]) -> list[Tensor]:
    """Results of all ranks, each by its own plan."""
    copies = [each.clone() for each in parts]

    def start(comm: simulated.Simulated):  # type: ignore[no-untyped-def]
        mine, x = made[comm.rank], copies[comm.rank]
        if mine.intra_node is None:
            mine = on(mine, comm)
        else:  # holds parts of its communicator
            mine = plan.plan("all_reduce", x.shape, x.dtype, x.device, comm, mine.config)
        return ALGORITHMS[mine.algorithm](x, x, mine, CALL)

    return simulated.run(start, len(parts), made[0].comm.nodes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nodes", LAYOUTS)
def test_the_sum_is_that_of_the_machines_exact_sums(nodes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    made = plans(shape, nodes)
    assert all(each.algorithm == "hierarchical" for each in made)
    parts = [part(rank, shape) for rank in range(len(nodes))]
    results = reduced(made, parts)
    assert all(torch.equal(each, results[0]) for each in results), "all ranks hold the same bits"
    sums = {each: sum(p.float() for p, n in zip(parts, nodes, strict=True) if n == each) for each in nodes}
    slices = made[0].intra_node
    assert slices is not None and slices.world == len(nodes) // len(sums)
    for number in range(slices.world):
        ranks = sorted([rank for rank, node in enumerate(nodes) if node == each][number] for each in sums)
        mine = [slices.of(each.reshape(-1))[number].clone() for each in (sums[nodes[rank]] for rank in ranks)]
        if mine[0].numel():
            rows = mine[0].numel() // shape[-1] if len(shape) > 1 else 1
            flat = [
                planned("all_reduce", mine[0].view(rows, -1), len(mine), made[0].config, r) for r in range(len(mine))
            ]
            expected = simulate(flat, mine, mine)[0].to(parts[0].dtype)
            assert torch.equal(slices.of(results[0].reshape(-1))[number], expected)


@pytest.mark.parametrize("nodes", LAYOUTS)
def test_counted_bytes_are_those_sent(nodes: tuple[int, ...]) -> None:
    shape, sent = (50, 100), {}
    made = plans(shape, nodes)

    class Counting(simulated.Simulated):
        """Notes what is sent to whom."""

        def exchange(self, outbox, out_sizes, inbox, in_sizes, call):  # type: ignore[no-untyped-def]
            near, far = sent.get(self.rank, (0, 0))
            for to, size in enumerate(out_sizes):
                is_far = nodes[to] != nodes[self.rank]
                near, far = near + size * (to != self.rank and not is_far), far + size * is_far
            sent[self.rank] = near, far
            return super().exchange(outbox, out_sizes, inbox, in_sizes, call)

    def start(comm: simulated.Simulated):  # type: ignore[no-untyped-def]
        counting = Counting(comm.rank, comm.world, nodes, mailbox=comm._mailbox)
        x = part(comm.rank, shape)
        mine = plan.plan("all_reduce", x.shape, x.dtype, x.device, counting, made[0].config)
        return ALGORITHMS[mine.algorithm](x, x, mine, CALL)

    simulated.run(start, len(nodes), nodes)
    assert sent == {r: (made[r].wire_bytes - made[r].remote_bytes, made[r].remote_bytes) for r in range(len(nodes))}


def test_one_machine_or_one_rank_on_each_or_uneven_machines_need_no_hierarchy() -> None:
    in_another_order = (0, 1, 1, 0)  # slice by slice: sums of rows would depend on where they are
    for nodes in ((0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 0, 1), in_another_order):
        for asked in ("auto", "hierarchical"):
            assert plans((1000,), nodes, algorithm=asked)[0].algorithm == "two-step"
    assert plans((1000,), (0, 0, 1, 1), algorithm="two-step")[0].algorithm == "two-step"


# ---- pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one-step", "two-step"])
@pytest.mark.parametrize("shape", [(6144,), (50, 100)])
def test_pieces_are_the_all_reduce_of_each(kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PIECE", {"cpu": 600})
    made = plans(shape, (0, 0, 0), algorithm=kind)
    parts = [part(rank, shape) for rank in range(3)]
    found, pieces, total = reduced(made, parts)[0].view(-1), made[0].pieces, [0, 0, 0]
    assert len(pieces) > 2 and pieces[0].first == 0 and pieces[-1].last == parts[0].numel()
    monkeypatch.setattr(plan, "PIECE", {})
    for piece in pieces:
        cut = [each.view(-1)[piece.first : piece.last] for each in parts]
        if len(shape) > 1:
            assert piece.first % shape[-1] == piece.last % shape[-1] == 0, "pieces end where rows do"
            cut = [each.view(-1, shape[-1]) for each in cut]
        alone = plans(tuple(cut[0].shape), (0, 0, 0), algorithm=kind)
        assert torch.equal(found[piece.first : piece.last], reduced(alone, cut)[0].view(-1))
        total = [a + b.wire_bytes for a, b in zip(total, alone, strict=True)]
    assert total == [each.wire_bytes for each in made]


def test_all_pieces_are_posted_before_the_first_is_awaited() -> None:
    events: list[str] = []

    def algorithm(x: Tensor, piece: plan.Piece, number: int, *more: object) -> algorithms.Legs:
        events.append(f"post {number}")
        yield simulated.Posted()
        events.append(f"decode {number}")

    made = plans((5000,), (0, 0))[0]
    list(algorithms.pipelined(algorithm, torch.ones(5000), made._replace(pieces=made.pieces * 3), CALL, None))
    assert events == ["post 0", "post 1", "post 2", "decode 0", "decode 1", "decode 2"]


# ---- real ranks -------------------------------------------------------------------------------------------------


def two_machines(rank: int, world: int) -> Tensor:
    shared_memory.machine = lambda: f"machine {rank // 2}"
    counters.reset_stats()
    x = part(rank, (3000, 400))
    result = all_reduce(x.clone(), None, Config(bits=4, min_bytes=0))
    made = plans((3000, 400), (0, 0, 1, 1))
    everyone = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(everyone, x)
    assert torch.equal(result, reduced(made, everyone)[rank]), "the simulated ranks say the same"
    counted = counters.stats()
    assert counted["wire_bytes"] == made[rank].wire_bytes and counted["remote_bytes"] == made[rank].remote_bytes > 0
    return result


def test_two_machines_with_two_ranks_each() -> None:
    results = spawn(two_machines, 4)
    assert all(torch.equal(result, results[0]) for result in results)
