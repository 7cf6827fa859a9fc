"""The collectives as operators of torch.library, so that torch.compile traces through code that calls them.

A compiled graph holds one operator for each collective and knows only shapes; the collective itself runs when the
graph does, with the same planning, counting and results. Tensors, names and numbers are all an operator may be given,
so groups travel by their name and configurations as a line of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import Config


@torch.library.custom_op("flashcomm::all_reduce", mutates_args=("x",))
def _all_reduce(x: Tensor, group: str, config: str) -> None:
    from . import all_reduce  # as below: the package imports this file

    result = all_reduce(x, _group(group), _config(config))
    if result is not x:
        x.copy_(result)


@_all_reduce.register_fake
def _(x: Tensor, group: str, config: str) -> None:
    return None


def _resizing(kind: str) -> Callable[[Tensor, dist.ProcessGroup | None, Config | None], Tensor]:
    """Define the operator "reduce_scatter" or "all_gather"; the collective as seen by torch.compile."""

    @torch.library.custom_op(f"flashcomm::{kind}", mutates_args=())
    def operator(x: Tensor, group: str, world: int, config: str) -> Tensor:
        from .. import collectives

        result: Tensor = getattr(collectives, kind)(x, _group(group), _config(config))
        return result

    @operator.register_fake
    def _(x: Tensor, group: str, world: int, config: str) -> Tensor:
        rows = x.size(0) * world if kind == "all_gather" else x.size(0) // world
        return x.new_empty((rows, *x.shape[1:]))

    def call(x: Tensor, group: dist.ProcessGroup | None, config: Config | None) -> Tensor:
        world = dist.get_world_size() if group is None else group.size()
        result: Tensor = operator(x.view(x.shape or 1), _name(group), world, _text(config))
        return result

    return call


reduce_scatter, all_gather = _resizing("reduce_scatter"), _resizing("all_gather")


def all_reduce(x: Tensor, group: dist.ProcessGroup | None, config: Config | None) -> Tensor:
    """:func:`collectives.all_reduce` as seen by torch.compile."""
    x = x.contiguous()
    _all_reduce(x, _name(group), _text(config))
    return x


def _name(group: dist.ProcessGroup | None) -> str:
    return "" if group is None else str(group.group_name)


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
