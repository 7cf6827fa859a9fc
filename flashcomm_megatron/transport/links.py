"""Which transport carries a group's messages: shared memory between ranks of one machine, or the process group.

Decided once for each group, by all its ranks together; the choice depends on the configuration, on where the ranks run,
and on a vote. Messages only: kernels that run a whole collective are chosen in workspace.py.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ..config import Config
from . import group as over_group
from .link import Exchange, Link
from .streams import Streams

SHARED_MEMORY = ("auto", "host")  # the transports that use it for tensors in main memory
DEFAULT_SECONDS = 1800.0  # torch.distributed's own

_streams: WeakKeyDictionary[dist.ProcessGroup, Streams] = WeakKeyDictionary()


def link(group: dist.ProcessGroup, device: torch.device, config: Config, what: str) -> Link:
    """This rank's end of ``group`` for one call, which errors call ``what``. A group's first link is collective."""
    exchange: Exchange = partial(over_group.exchange, group=group, seconds=seconds(group, config), what=what)
    if device.type == "cpu" and config.transport in SHARED_MEMORY:
        streams = _open(group)
        if not streams.reason:
            exchange = partial(streams.exchange, seconds=seconds(group, config), what=what)
    return Link(group.rank(), group.size(), exchange)


def seconds(group: dist.ProcessGroup, config: Config) -> float:
    """How long a rank waits for another one: ``config.timeout``, else what the process group was made with."""
    if config.timeout is not None:
        return config.timeout
    try:
        found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    except (RuntimeError, AttributeError):
        return DEFAULT_SECONDS
    return found.total_seconds()


def _open(group: dist.ProcessGroup) -> Streams:
    if group not in _streams:
        _streams[group] = made = Streams(group)
        if made.reason and group.rank() == 0:
            print(f"flash-comm: transport group ({made.reason})", flush=True)
    return _streams[group]


def close(group: dist.ProcessGroup) -> None:
    """Let go of this rank's ends; the group's next call opens new ones. On every rank."""
    _streams.pop(group, None)
