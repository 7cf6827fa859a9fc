"""All-to-all: rows of any number between every pair of ranks, their gradients, and Megatron's token dispatcher."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from specification import planned
from torch import Tensor

import flashcomm_megatron as fc
from flashcomm_megatron import cpu
from flashcomm_megatron.codec import Raw
from flashcomm_megatron.collectives.plan import message_codec
from flashcomm_megatron.config import Config
from flashcomm_megatron.observe import counters

SPLITS = [[3, 0, 40], [700, 1, 0], [5, 300, 2]]  # rows from (line) to (column)


def rows(source: int, to: int, hidden: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(10 * source + to)
    return torch.randn(SPLITS[source][to], hidden, generator=generator).bfloat16()


def exchanged(rank: int, world: int) -> None:
    for transport in ("auto", "group"):
        config = Config(bits=4, transport=transport)
        plan = planned("all_to_all", torch.ones(64, dtype=torch.bfloat16), world, config)
        counters.reset_stats()
        x = torch.cat([rows(rank, to) for to in range(world)])
        outs = [SPLITS[source][rank] for source in range(world)]
        handle = fc.all_to_all(x, None, config, async_op=True, output_splits=outs, input_splits=SPLITS[rank])
        found = handle.wait().split(outs)
        sent = 0
        for peer in range(world):
            codec = message_codec(rows(peer, rank), plan)
            expected = rows(peer, rank)
            if peer != rank and expected.numel():
                payload = codec.encode(expected.view(-1), width=64)
                expected = codec.decode_sum([payload], torch.empty_like(expected).view(-1), 64).view_as(expected)
            assert torch.equal(found[peer], expected), (transport, peer, rank)
            if peer != rank and transport == "auto":
                leaving = rows(rank, peer)
                sent += math.ceil(message_codec(leaving, plan).wire_bytes(leaving.numel(), 64) / 16) * 16
        if transport == "auto":
            assert counters.stats()["wire_bytes"] == sent
    whole = torch.arange(world * 2).view(-1, 1) + 100 * rank
    exact = fc.all_to_all(whole, None, Config(bits=4))
    expected = torch.cat([torch.arange(2 * rank, 2 * rank + 2).view(-1, 1) + 100 * peer for peer in range(world)])
    assert torch.equal(exact, expected) and counters.stats()["deferred"] == {"dtype int64": 1}
    with pytest.raises(ValueError, match="do not fit"):
        fc.all_to_all(x, None, Config(bits=4), input_splits=[1] * world, output_splits=[1] * world)
    with pytest.raises(ValueError, match="keeps 1 of its own rows and awaits 2"):
        splits = [[1 + (peer == rank) * more for peer in range(world)] for more in (1, 0)]
        fc.all_to_all(torch.ones(world, 2), None, Config(bits=4), output_splits=splits[0], input_splits=splits[1])
    with pytest.raises(ValueError, match="not a multiple"):
        fc.all_to_all(torch.ones(world + 1, 2), None, Config(bits=4))


def test_every_pair_exchanges_its_rows() -> None:
    spawn(exchanged, 3)


def mismatched(rank: int, world: int, transport: str) -> str:
    """Rank 1 awaits fewer rows than it is sent."""
    config = Config(bits=4, transport=transport, min_bytes=0, timeout=2.0)
    fc.all_to_all(torch.ones(100 * world, 64), None, config)
    outs = [90 if (rank, peer) == (1, 0) else 100 for peer in range(world)]
    try:
        fc.all_to_all(torch.ones(100 * world, 64), None, config, output_splits=outs, input_splits=[100] * world)
    except RuntimeError as error:
        return str(error)
    return ""  # rank 0 may be through before rank 1 looks


@pytest.mark.parametrize(
    ("transport", "told"),
    [
        ("shared-memory", "rank 0 is in the same call but sends another length than the"),
        ("group", "no message passed between this rank and rank 0"),
    ],
)
def test_splits_that_do_not_match_are_an_error_in_time(transport: str, told: str) -> None:
    assert told in spawn(mismatched, 2, transport, lost=[0])[1]


def test_small_messages_are_exact() -> None:
    plan = planned("all_to_all", torch.ones(64, dtype=torch.bfloat16), 2, Config(bits=4))
    small, large = torch.empty(8, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    assert isinstance(message_codec(small, plan), Raw)
    assert message_codec(large, plan) == Config(bits=4).legs.gather


def scalar(rank: int, world: int) -> None:
    for options in ({}, {"input_splits": [1, 0], "output_splits": [1, 0]}):
        with pytest.raises(ValueError, match="without dimensions"):
            fc.all_to_all(torch.tensor(1.0), None, Config(bits=4), **options)


def test_a_tensor_without_rows_is_refused() -> None:
    spawn(scalar, 2)


def dispatched(rank: int, world: int) -> None:
    cpu.enable()
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    torch.manual_seed(rank)
    tokens, probabilities = torch.randn(300, 64), torch.rand(300)
    ins, outs = ([100, 200], [100, 50]) if rank == 0 else ([50, 250], [200, 250])

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        result = token_dispatcher.all_to_all(dist.group.WORLD, x, outs, ins)
        result.square().sum().backward()
        assert x.grad is not None
        return result.detach(), x.grad

    original, exact = token_dispatcher.all_to_all, run(tokens)
    assert original is mappings.all_to_all
    with fc.flashcomm(bits=4):
        assert all(map(torch.equal, run(tokens), exact)), "off unless asked for"
    with fc.flashcomm(bits=6, experts=True, grad_bits=16):
        result, gradient = run(tokens)
        assert 0 < (result - exact[0]).norm() / exact[0].norm() < 0.03
        assert torch.equal(
            run(probabilities)[0], fc.all_to_all(probabilities.double(), output_splits=outs, input_splits=ins).float()
        )
    with fc.flashcomm(bits=6, experts=True, grad_bits=8):
        assert torch.equal(run(tokens)[0], result)
        error = (run(tokens)[1] - gradient).norm() / gradient.norm()
        assert 0 < error < 0.01
    assert token_dispatcher.all_to_all is original


def test_the_token_dispatchers_tokens_but_not_its_probabilities() -> None:
    pytest.importorskip("megatron.core.transformer.moe.token_dispatcher")
    spawn(dispatched, 2)
