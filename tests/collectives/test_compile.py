"""torch.compile traces through the collectives: one graph, no break, the same bits as without it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import spawn

from flashcomm_megatron.collectives import all_gather, all_reduce, reduce_scatter
from flashcomm_megatron.config import Config, set_current


def layer(x: torch.Tensor, group: dist.ProcessGroup | None, config: Config | None) -> torch.Tensor:
    """A sum, a scatter and a gather with arithmetic between them."""
    total = all_reduce(x * 2, group, config) + 1
    mine = reduce_scatter(total, group, config) * 3
    return all_gather(mine, group, config) - x


def _compare(rank: int, world: int) -> None:
    config = Config(bits=4, min_bytes=0)
    x = torch.randn(8 * world, 96, generator=torch.Generator().manual_seed(rank))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for group in (dist.group.WORLD, None):
        assert torch.equal(compiled(x, group, config), layer(x, group, config))
    set_current(Config(bits=8, min_bytes=0))
    assert torch.equal(compiled(x, None, None), layer(x, None, None)), "the configuration in force when it runs"
    assert not torch.equal(compiled(x, None, None), layer(x, None, config))


def test_one_graph_with_the_same_bits():
    spawn(_compare, 2)


def _operators(rank: int, world: int) -> None:
    """The fake implementations say of shapes, strides and mutation what is true."""
    arguments = (Config(bits=4, min_bytes=0).text,)
    name = dist.group.WORLD.group_name
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.flashcomm
    torch.library.opcheck(operators.all_reduce, (torch.randn(64, 3), name, *arguments), test_utils=checks)
    for operator in (operators.reduce_scatter, operators.all_gather):
        torch.library.opcheck(operator, (torch.randn(64, 3), name, world, *arguments), test_utils=checks)


def test_operators_are_what_they_say():
    spawn(_operators, 2)
