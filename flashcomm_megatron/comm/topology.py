"""Which machine each rank of a group runs on: asked once for each group, in one small gather."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch.distributed as dist

from . import segment, votes

_nodes: WeakKeyDictionary[dist.ProcessGroup, tuple[int, ...]] = WeakKeyDictionary()


def nodes(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The number of every rank's machine, counted in the order of the ranks. The first call is collective."""
    if group not in _nodes:
        machines = votes.gather(segment.machine().encode(), group) if group.size() > 1 else [b"this one"]
        numbers = {machine: number for number, machine in enumerate(dict.fromkeys(machines))}
        _nodes[group] = tuple(numbers[machine] for machine in machines)
    return _nodes[group]
