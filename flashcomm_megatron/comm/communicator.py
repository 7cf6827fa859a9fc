"""One object for each process group: who its ranks are, where they run, and what carries their messages.

A collective knows two ways to send. In both, this rank's own bytes stay where they are:

    exchange(outbox, out_sizes, inbox, in_sizes, call)   every rank its own message: reduce leg, all-to-all
    gather(inbox, own, call)                             one message to all: gather leg; own is a view of inbox

Buffers are contiguous uint8 tensors in which the ranks' parts lie one behind the other. Both return a transfer, whose
``wait()`` returns when everything has arrived; the buffers must stay untouched until then. Three things offer them:
the process group itself (process_group.py), shared memory between CPU ranks of one machine (shared_memory.py), and
simulated ranks (simulated.py). On GPUs a fused kernel may run a whole collective instead (fused.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..codec import native
from ..config import Config
from ..observe import messages
from . import shared_memory, sockets, stalls, votes
from .buffers import Buffers
from .process_group import ProcessGroup
from .progress import Progress
from .shared_memory import SharedMemory

DEFAULT_SECONDS = 1800.0  # torch.distributed's own


class Call(NamedTuple):
    """One collective as every rank must know it; as text, "#12/4f2a all_reduce [8, 64] float32 row".

    Messages carry it, so that ranks in different calls, or with different configurations, hear of it.
    """

    number: int  # of the group's calls, from 1
    title: str  # digest, kind, shape, dtype and site
    check: int  # 16 bits that differ, as good as surely, where the title or the configuration does
    seconds: float  # that a rank waits for another one

    def __str__(self) -> str:
        return f"#{self.number}/{self.title}"


class Transfer(Protocol):
    """Messages under way."""

    def wait(self) -> Any:
        """Return when all have been delivered (on a GPU: make the current stream wait for them)."""


class Transport(Protocol):
    """What carries messages: see above."""

    rank: int
    world: int

    def exchange(
        self, outbox: Tensor, out_sizes: Sequence[int], inbox: Tensor, in_sizes: Sequence[int], call: Call
    ) -> Transfer: ...

    def gather(self, inbox: Tensor, own: Tensor, call: Call) -> Transfer: ...


class Gpus(NamedTuple):
    """What ranks tell each other of their GPUs."""

    sockets: tuple[int, ...]  # every rank's processor socket, on one machine whose GPUs PCIe alone joins; else all 0
    has_nvlink: bool = False  # NVLink joins the ranks' GPUs, all on one machine
    has_kernels: bool = True  # the extension has CUDA kernels on every rank


class Communicator:
    """This rank's end of one process group. Made by :meth:`of`; the group must outlive its use, not its existence."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.world = group.rank(), group.size()
        self.ranks = dist.get_process_group_ranks(group)
        self.number = 0  # of compressed calls so far
        self.calls = stalls.Calls()
        self.agreed: list[Config] = []  # configurations that all ranks hold; the last one is in force
        self.plans: dict[Hashable, Any] = {}  # decisions about calls, which the collectives remember here
        self.progress = Progress()
        self.buffers = Buffers()
        self._group = weakref.ref(group)  # not the group: it would never be freed
        self._nodes: tuple[int, ...] | None = None
        self._gpus: Gpus | None = None
        self._over_group = ProcessGroup(group)
        self._shared: SharedMemory | None = None
        weakref.finalize(self, self.progress.close)

    @staticmethod
    def of(group: dist.ProcessGroup) -> Communicator:
        """The communicator of ``group``."""
        found = _communicators.get(group)
        if found is None:
            found = _communicators[group] = Communicator(group)
            if found.world > 1:
                stalls.watch(found)
        return found

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group. RuntimeError if it is gone."""
        group = self._group()
        if group is None:
            raise RuntimeError(f"flash-comm: the process group of ranks {self.ranks} was destroyed.")
        return group

    @property
    def nodes(self) -> tuple[int, ...]:
        """The number of every rank's machine, counted in the order of the ranks. The first use is collective."""
        if self._nodes is None:
            self._nodes = _numbered(self._told(shared_memory.machine()))
        return self._nodes

    @property
    def gpus(self) -> Gpus:
        """What is known of the ranks' GPUs. The first use is collective; only calls on GPUs ask."""
        if self._gpus is None:
            told = self._told(f"{sockets.socket()}\n{'kernels' if native.cuda() else ''}")
            places, kernels = zip(*(each.split(b"\n") for each in told), strict=True)
            is_one, has_nvlink = len(set(self.nodes)) == 1, sockets.NVLINK.encode() in places
            over_pcie = is_one and all(places) and not has_nvlink
            numbers = _numbered(places) if over_pcie else (0,) * self.world
            self._gpus = Gpus(numbers, is_one and has_nvlink, all(kernels))
        return self._gpus

    def _told(self, mine: str) -> list[bytes]:
        """What every rank says of itself, where this one says ``mine``."""
        return votes.gather(mine.encode(), self.group) if self.world > 1 else [mine.encode()]

    def transport_name(self, device: torch.device, config: Config) -> str:
        """What joins the ranks for tensors on ``device``: "shared memory", else the device's kind."""
        return "shared memory" if self.transport(device, config) is self._shared else device.type

    def transport(self, device: torch.device, config: Config) -> Transport:
        """What carries messages between tensors on ``device``. A group's first use is collective."""
        if device.type != "cpu":
            if config.transport == "shared-memory":
                messages.unexpected("transport shared-memory does not serve: it is for tensors on CPUs.", config)
            return self._over_group
        if config.transport in ("peer", "host"):
            messages.unexpected(f"transport {config.transport} does not serve: it is for tensors on GPUs.", config)
        if config.transport == "group" or self.world == 1:
            return self._over_group
        if len(set(self.nodes)) > 1:
            reason = "the ranks are on several machines"
        elif not (reason := self._share().reason):
            return self._share()
        if config.transport == "shared-memory":
            messages.unexpected(f"transport shared-memory does not serve: {reason}.", config)
        return self._over_group

    def transport_if_open(self, device: torch.device, config: Config) -> Transport:
        """As :meth:`transport`, opening nothing: for what ranks tell each other before a call."""
        serves = device.type == "cpu" and config.transport != "group" and self._shared and not self._shared.reason
        return self._shared if serves and self._shared else self._over_group

    def _share(self) -> SharedMemory:
        if self._shared is None:
            self._shared = SharedMemory(self.group)
            if self._shared.reason and self.rank == 0:
                messages.fell_back("shared memory", self.ranks, f"the process group ({self._shared.reason})")
        return self._shared

    def seconds(self, config: Config) -> float:
        """How long a rank waits for another one: ``config.timeout``, else what the process group was made with."""
        if config.timeout is not None:
            return config.timeout
        for kind in ("cpu", "cuda"):
            with suppress(RuntimeError, AttributeError):  # a group of the other kind alone; a backend without options
                found: timedelta = self.group._get_backend(torch.device(kind)).options._timeout
                return found.total_seconds()
        return DEFAULT_SECONDS

    @property
    def has_failed(self) -> bool:
        """Whether an error ended a wait for another rank: the group is done."""
        return self._over_group.has_failed or (self._shared is not None and self._shared.has_failed)

    def stop(self, reason: str) -> None:
        """Say ``reason`` and end every wait for other ranks with it, on any thread: they will not answer."""
        messages.warn(f"flash-comm: {reason}")
        self._over_group.stop(reason)
        if self._shared is not None:
            self._shared.stopped = reason

    def close(self) -> None:
        """Let go of this rank's shared memory; the next call opens it anew. On every rank."""
        self.progress.drain()
        self._shared = None
        self.plans.clear()
        self.buffers = Buffers()


_communicators: WeakKeyDictionary[dist.ProcessGroup, Communicator] = WeakKeyDictionary()


def _numbered(names: Sequence[bytes]) -> tuple[int, ...]:
    """Each name's number, counted in the order in which they come."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(numbers[name] for name in names)
