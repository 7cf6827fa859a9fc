"""Messages over a torch process group: NCCL, gloo, or whatever backend the group has.

On GPUs each exchange is one collective of the backend, all_to_all_single or all_gather_into_tensor: it knows the
machine's topology, so that a payload crosses a switch once and not once for each peer, and it can be captured. The
backend itself is asked: what torch.distributed's functions check and log takes as long again, and so does torch's
dispatcher. In main memory they are messages from rank to rank, receives posted first: over gloo that is faster than its
collectives.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions

from . import votes

if TYPE_CHECKING:
    from .communicator import Call, Transfer

TAG = 0x7C << 24  # tells these messages from a user's own point-to-point traffic on the same group


@lru_cache
def _options(kind: type) -> Any:
    """Options of a collective that the caller waits for."""
    made = kind()
    if hasattr(made, "asyncOp"):  # torch 2.7 or newer
        made.asyncOp = True
    return made


class Messages:
    """The messages of one exchange in main memory."""

    def __init__(self, ends: ProcessGroup, call: Call, buffers: tuple[Tensor, ...]) -> None:
        self.works: list[tuple[Any, int]] = []  # and the peer of each
        self.is_done = False
        self._ends, self._call, self._buffers = ends, call, buffers

    def wait(self) -> None:
        """Block until all were delivered; RuntimeError naming the peer of one that was not."""
        seconds, peer = timedelta(seconds=self._call.seconds), 0
        try:
            for work, peer in self.works:  # noqa: B007
                work.wait(seconds)
        except RuntimeError as error:
            raise self.undelivered(peer, error) from error
        self.is_done = True

    def undelivered(self, peer: int, error: RuntimeError) -> RuntimeError:
        """The error of a message that was not delivered, which names the call and the rank."""
        self._ends.has_failed = True
        if self._ends.stopped:
            return RuntimeError(f"flash-comm: {self._call}: {self._ends.stopped}")
        return RuntimeError(
            f"flash-comm: {self._call}: no message passed between this rank and rank {self._ends.ranks[peer]} "
            f"(allowed: {self._call.seconds:g} s). Look for that rank's own error; if it has none, it is in another "
            f"call or holds another configuration. The process group says: {error}"
        )


class ProcessGroup:
    """Exchanges between the ranks of one process group."""

    messages: ClassVar[Collection[str]] = ("cpu",)  # kinds of devices between which each exchange is messages

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.world = group.rank(), group.size()
        self.ranks = dist.get_process_group_ranks(group)
        self.has_failed, self.stopped = False, ""  # whether a wait ended with an error; why no message will arrive
        self._group = weakref.ref(group)
        self._backends: dict[str, Any] = {}  # by kind of device
        self._under_way: deque[Messages] = deque()  # also of who was interrupted: their peers still expect them

    def exchange(
        self, outbox: Tensor, out_sizes: Sequence[int], inbox: Tensor, in_sizes: Sequence[int], call: Call
    ) -> Transfer:
        """Send each rank its part of ``outbox`` and receive from each its part of ``inbox``."""
        if outbox.device.type in self.messages:
            sends, receives = torch.split(outbox, list(out_sizes)), torch.split(inbox, list(in_sizes))
            return self._post(sends, receives, outbox, inbox, call)
        # Nobody's part of a sum differs, and backends are quicker without sizes. In an all-to-all a rank sends itself
        # nothing; it may send nothing at all, and receive.
        is_even = out_sizes[0] > 0 and out_sizes.count(out_sizes[0]) == self.world
        splits: Any = ([], []) if is_even else (list(in_sizes), list(out_sizes))
        posted: Transfer = self._backend(outbox).alltoall_base(inbox, outbox, *splits, _options(AllToAllOptions))
        return posted

    def gather(self, inbox: Tensor, own: Tensor, call: Call) -> Transfer:
        """Send every rank ``own``, this rank's place in ``inbox``, and receive theirs."""
        if inbox.device.type in self.messages:
            return self._post([own] * self.world, inbox.view(self.world, own.numel()).unbind(), inbox, inbox, call)
        posted: Transfer = self._backend(inbox)._allgather_base(inbox, own, _options(AllgatherOptions))
        return posted

    def _backend(self, x: Tensor) -> Any:
        """What moves tensors like ``x``: the group without torch's dispatcher, which takes as long as the launch."""
        kind = x.device.type
        found = self._backends.get(kind)
        if found is None:
            group: Any = self._group()
            try:
                found = self._backends[kind] = group._get_backend(x.device)
            except RuntimeError:  # a group written in Python is its own backend, and not to be kept alive here
                return group
        return found

    def stop(self, reason: str) -> None:
        """End every wait in main memory, on any thread and with any rank, with an error that says ``reason``.

        Gloo closes a group's connections when a receive misses its deadline; the one here has none to speak of.
        """
        self.stopped, group = reason, cast("Any", self._group())
        if votes.device(group).type == "cpu":
            with suppress(RuntimeError):
                group.recv([torch.empty(1)], (self.rank + 1) % self.world, TAG).wait(timedelta(milliseconds=1))

    def _post(
        self, sends: Sequence[Tensor], receives: Sequence[Tensor], outbox: Tensor, inbox: Tensor, call: Call
    ) -> Messages:
        """Messages in main memory. An empty one is neither sent nor awaited.

        Gloo ends the process when a message's length is not the one awaited, so the tag is the call's and the length's
        own: messages that differ in either never meet.
        """
        group: Any = self._group()
        posted = Messages(self, call, (outbox, inbox))
        while self._under_way and self._under_way[0].is_done:
            self._under_way.popleft()
        self._under_way.append(posted)
        tag, peer = TAG | (call.number % 64) << 16, 0
        try:  # posting fails as well where a rank is gone
            for parts, post in ((receives, group.recv), (sends, group.send)):
                for distance in range(1, self.world):
                    peer = (self.rank + (distance if parts is sends else -distance)) % self.world
                    size = parts[peer].numel()
                    if size:  # Knuth's multiplicative hash: near lengths get numbers far from each other
                        length = size * 2654435761 >> 16 & 0xFFFF
                        posted.works.append((post([parts[peer]], peer, tag | (call.check ^ length)), peer))
        except RuntimeError as error:
            raise posted.undelivered(peer, error) from error
        return posted
