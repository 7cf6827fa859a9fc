"""Which transport carries a group's messages: streams of our own between CPUs, the process group for all else.

Decided once for each group, by all its ranks together; the choice depends on the configuration, on where the ranks run,
and on a vote. Messages only: kernels that run a whole collective are chosen in workspace.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import Config
from ..observe import counters
from ..observe import messages as announce
from . import process_group as over_group
from . import topology
from .link import Call, Exchange, Link, Transfer
from .streams import Streams
from .wire import STREAMED, Wire

DEFAULT_SECONDS = 1800.0  # torch.distributed's own

_streams: WeakKeyDictionary[dist.ProcessGroup, Streams] = WeakKeyDictionary()
_wires: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, str], Wire]] = WeakKeyDictionary()
_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def wire(group: dist.ProcessGroup, device: torch.device, config: Config) -> Wire:
    """How the ranks of ``group`` are joined for tensors on ``device``. A group's first call is collective."""
    known, key = _wires.setdefault(group, {}), (device.type, config.transport)
    if key not in known:
        nodes = topology.nodes(group)
        streamed = device.type == "cpu" and config.transport in STREAMED and len(nodes) > 1
        kind = "connections" if len(set(nodes)) > 1 else "shared memory"
        known[key] = Wire(kind if streamed and not _open(group).reason else device.type, nodes)
    return known[key]


def link(group: dist.ProcessGroup, device: torch.device, config: Config, text: str, digest: str = "") -> Link:
    """This rank's end of ``group`` for one call: ``text`` names it in errors, ``digest`` the configuration.

    A group's first link is collective.
    """
    _calls[group] = number = _calls.get(group, 0) + 1
    allowed, call = seconds(group, config), Call(number, text, digest)
    exchange: Exchange = partial(over_group.exchange, group=group, seconds=allowed, call=call)
    nodes = topology.nodes(group)
    far = [node != nodes[group.rank()] for node in nodes]
    if device.type == "cpu" and config.transport == "peer":
        announce.unexpected("transport peer does not serve: it is for tensors on GPUs.", config)
    if device.type == "cpu" and config.transport in STREAMED:
        streams = _open(group)
        if not streams.reason:
            exchange = partial(streams.exchange, seconds=allowed, call=call)
        elif config.transport == "host":
            announce.unexpected(f"transport host does not serve: {streams.reason}.", config)
    if any(far):
        exchange = _counted(exchange, far)
    return Link(group.rank(), group.size(), exchange)


def _counted(exchange: Exchange, far: Sequence[bool]) -> Exchange:
    """Count what leaves this machine."""

    def counting(sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Sequence[Transfer]:
        counters.count_remote(sum(each.numel() for each, is_far in zip(sends, far, strict=True) if is_far))
        return exchange(sends, receives)

    return counting


def aside(group: dist.ProcessGroup, device: torch.device, config: Config, text: str) -> Link:
    """An end for what ranks tell each other before a call: where their calls go if that is open, opening nothing."""
    exchange, streams = over_group.exchange, _streams.get(group)
    call, waits = Call(0, text, ""), seconds(group, config)
    if streams and not streams.reason and device.type == "cpu" and config.transport in STREAMED:
        return Link(group.rank(), group.size(), partial(streams.exchange, seconds=waits, call=call))
    return Link(group.rank(), group.size(), partial(exchange, group=group, seconds=waits, call=call))


def seconds(group: dist.ProcessGroup, config: Config) -> float:
    """How long a rank waits for another one: ``config.timeout``, else what the process group was made with."""
    if config.timeout is not None:
        return config.timeout
    try:
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        found: timedelta = group._get_backend(device).options._timeout
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
