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
from .link import Call, Exchange, Link
from .streams import Streams

SHARED_MEMORY = ("auto", "host")  # the transports that use it for tensors in main memory
DEFAULT_SECONDS = 1800.0  # torch.distributed's own

_streams: WeakKeyDictionary[dist.ProcessGroup, Streams] = WeakKeyDictionary()
_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def link(group: dist.ProcessGroup, device: torch.device, config: Config, text: str, digest: str = "") -> Link:
    """This rank's end of ``group`` for one call: ``text`` names it in errors, ``digest`` the configuration.

    A group's first link is collective.
    """
    _calls[group] = number = _calls.get(group, 0) + 1
    allowed, call = seconds(group, config), Call(number, text, digest)
    exchange: Exchange = partial(over_group.exchange, group=group, seconds=allowed, call=call)
    if device.type == "cpu" and config.transport in SHARED_MEMORY:
        streams = _open(group)
        if not streams.reason:
            exchange = partial(streams.exchange, seconds=allowed, call=call)
    return Link(group.rank(), group.size(), exchange)


def before_first(group: dist.ProcessGroup, config: Config, text: str) -> Link:
    """An end over the process group that waits no longer than any call, for what comes before a group's first."""
    call = Call(0, text, "")
    exchange: Exchange = partial(over_group.exchange, group=group, seconds=seconds(group, config), call=call)
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
