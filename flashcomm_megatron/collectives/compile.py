"""The collectives as operators of torch.library, so that torch.compile traces through code that calls them.

A compiled graph holds one operator for each collective and knows only shapes; the collective itself runs when the
graph does, with the same planning, counting and results. Tensors, names and numbers are all an operator may be given,
so groups travel by their name and configurations as a line of JSON.
"""

from __future__ import annotations

import json
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import Config


@torch.library.custom_op("flashcomm::all_reduce", mutates_args=("x",))
def _all_reduce(x: Tensor, group: str, config: str) -> None:
    from . import all_reduce  # as in the two below: the package imports this file

    result = all_reduce(x, _group(group), _config(config))
    if result is not x:
        x.copy_(result)


@torch.library.custom_op("flashcomm::reduce_scatter", mutates_args=())
def _reduce_scatter(x: Tensor, group: str, world: int, config: str) -> Tensor:
    from . import reduce_scatter

    result: Tensor = reduce_scatter(x, _group(group), _config(config))
    return result


@torch.library.custom_op("flashcomm::all_gather", mutates_args=())
def _all_gather(x: Tensor, group: str, world: int, config: str) -> Tensor:
    from . import all_gather

    result: Tensor = all_gather(x, _group(group), _config(config))
    return result


@_all_reduce.register_fake
def _(x: Tensor, group: str, config: str) -> None:
    return None


@_reduce_scatter.register_fake
def _(x: Tensor, group: str, world: int, config: str) -> Tensor:
    return x.new_empty((x.size(0) // world, *x.shape[1:]))


@_all_gather.register_fake
def _(x: Tensor, group: str, world: int, config: str) -> Tensor:
    return x.new_empty((world * x.size(0), *x.shape[1:]))


def all_reduce(x: Tensor, group: dist.ProcessGroup | None, config: Config | None) -> Tensor:
    """:func:`collectives.all_reduce` as seen by torch.compile."""
    x = x.contiguous()
    _all_reduce(x, _name(group), _text(config))
    return x


def reduce_scatter(x: Tensor, group: dist.ProcessGroup | None, config: Config | None) -> Tensor:
    """:func:`collectives.reduce_scatter` as seen by torch.compile."""
    result: Tensor = _reduce_scatter(x, _name(group), _world(group), _text(config))
    return result


def all_gather(x: Tensor, group: dist.ProcessGroup | None, config: Config | None) -> Tensor:
    """:func:`collectives.all_gather` as seen by torch.compile."""
    result: Tensor = _all_gather(x.view(x.shape or 1), _name(group), _world(group), _text(config))
    return result


def _name(group: dist.ProcessGroup | None) -> str:
    return "" if group is None else str(group.group_name)


def _world(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size() if group is None else group.size()


def _text(config: Config | None) -> str:
    """The configuration as an operator's argument; empty for the one in force when the graph runs."""
    return "" if config is None else config.text


@lru_cache
def _config(text: str) -> Config | None:
    return Config(**json.loads(text)) if text else None


def _group(name: str) -> dist.ProcessGroup | None:
    found: dist.ProcessGroup | None = None
    if name:
        found = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type, unused-ignore]
    return found
