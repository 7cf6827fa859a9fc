"""Which transport carries a group's messages: shared memory inside a machine, the process group between machines.

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

from .. import announce, counters
from ..config import Config
from . import group as over_group
from . import topology
from .link import Call, Exchange, Link, Transfer
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
    nodes = topology.nodes(group)
    far = [node != nodes[group.rank()] for node in nodes]
    if any(far):
        exchange = _counted(exchange, far)
    shares_a_machine = len(set(nodes)) < len(nodes)
    if device.type == "cpu" and config.transport == "peer":
        announce.unexpected("transport peer does not serve: it is for tensors on GPUs.", config)
    if device.type == "cpu" and config.transport == "host" and not shares_a_machine:
        announce.unexpected("transport host does not serve: every rank is on a machine of its own.", config)
    if device.type == "cpu" and config.transport in SHARED_MEMORY and shares_a_machine:
        streams = _open(group)
        if streams.reason and config.transport == "host":
            announce.unexpected(f"transport host does not serve: {streams.reason}.", config)
        if not streams.reason:
            near: Exchange = partial(streams.exchange, seconds=allowed, call=call)
            exchange = _routed(near, exchange, far) if any(far) else near
    return Link(group.rank(), group.size(), exchange)


def _routed(near: Exchange, beyond: Exchange, far: Sequence[bool]) -> Exchange:
    """Messages to ranks that are ``far`` go ``beyond`` this machine, all others stay ``near``."""

    def exchange(sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Sequence[Transfer]:
        def only(tensors: Sequence[Tensor], wanted: bool) -> list[Tensor]:
            return [each if is_far is wanted else each[:0] for each, is_far in zip(tensors, far, strict=True)]

        outward = beyond(only(sends, True), only(receives, True))
        return [*outward, *near(only(sends, False), only(receives, False))]

    return exchange


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
    if streams and streams.reaches_all and device.type == "cpu" and config.transport in SHARED_MEMORY:
        return Link(group.rank(), group.size(), partial(streams.exchange, seconds=waits, call=call))
    return Link(group.rank(), group.size(), partial(exchange, group=group, seconds=waits, call=call))


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
