"""One group's workspace: inboxes that all its ranks write, and the kernel that runs whole collectives on them.

:func:`serving` says whether a call runs here or over the process group. Every rank gives the same answer: it depends
on configuration, codecs, dtype and device kind, and on a workspace all ranks made together or none. Making one tries
``peer``, then ``host`` (inboxes.py), each step voted on; a real exchange of data is checked before it is
trusted, for the driver's word is not enough. What failed is printed once.

Calls may come on any stream: each waits, by an event, for the group's call before it. CUDA graphs may capture calls;
the user orders their replays with other calls of the group. Four workspaces fit on a GPU at once, whatever the order in
which ranks launch their calls on different streams; more may wait for each other until the deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..codec import native
from ..observe import messages
from . import shared_memory, votes
from .inboxes import HostInboxes, PeerInboxes

KINDS = {"one-step": 0, "two-step": 1, "reduce_scatter": 2, "all_gather": 3}  # enum Collective in csrc/cuda/shape.h
WORLDS = range(2, 9)
INBOXES: dict[str, type[PeerInboxes] | type[HostInboxes]] = {"peer": PeerInboxes, "host": HostInboxes}
# What is tried in turn before the process group. auto: nothing, until the kernels have passed make gpu-check.
CHAINS = {"auto": (), "peer": ("peer", "host"), "host": ("host",), "group": (), "shared-memory": ()}
REGIONS = 4  # of each source, in a ring (csrc/cuda/protocol.h)
REGION_BYTES = 4 << 20  # of each: messages beyond take more rounds of one kernel
KNOWN: native.Native = (0, 8, 32)  # the trial's number format: 8-bit integers in blocks of 32, as csrc/api.h numbers it

trial_seconds = 10.0  # how long a kernel waits for a peer while a workspace is tried out


class Kernel(NamedTuple):
    """What a fused kernel is told about a plan's only piece."""

    reduce: Any  # the legs' formats, as the extension knows them
    gather: Any
    length: int  # values of a slice


class Workspace:
    """Inboxes of all ranks of ``group`` on one device, ready to launch on."""

    def __init__(self, cuda: ModuleType, inboxes: Any, group: dist.ProcessGroup, device: int, blocks: int, region: int):
        self.cuda, self._inboxes, self._seconds = cuda, inboxes, trial_seconds
        self._ranks = dist.get_process_group_ranks(group)  # not the group: it would never be freed
        rank, world = group.rank(), group.size()
        self.device = device
        self.kernels = cuda.Workspace(device, world, rank, 1, blocks, region, inboxes.addresses)

    def run(
        self,
        kind: str,
        kernel: Kernel,
        x: Tensor,
        out: Tensor,
        residuals: Sequence[Tensor] = (),
        *,
        seconds: float,
        **tests: Any,
    ) -> Tensor:
        """Launch one collective of ``kind`` on the current stream and return ``out``.

        ``x``, ``out``: contiguous, on this device. ``residuals``: of both legs, added and replaced; or none.
        ``seconds``: how long the kernel waits for a peer; then it fills ``out`` with NaN, and :meth:`raise_error`
        raises, which callers ask before.
        """
        self._seconds = seconds
        request = self.cuda.Request(
            kind=KINDS[kind],
            reduce=kernel.reduce,
            gather=kernel.gather,
            dtype=native.DTYPES[x.dtype],
            numel=max(x.numel(), out.numel()),
            slice=kernel.length,
            x=[x.data_ptr()],
            out=[out.data_ptr()],
            residuals=[each.data_ptr() for each in residuals],
            stream=torch.cuda.current_stream(self.device).cuda_stream,
            deadline=seconds,
            **tests,
        )
        self.kernels.launch(request)
        return out

    def error(self) -> str:
        """Which rank's flag did not come in time, in any call so far that has ended; or nothing. Waits for nothing."""
        found = self.kernels.error()
        if not found:
            return ""
        leg, source, _, exchange = found
        return (
            f"rank {self._ranks[source]} did not arrive in the {('reduce', 'gather')[leg]} phase, "
            f"exchange {exchange}, within {self._seconds:g} s"
        )

    def raise_error(self) -> None:
        """RuntimeError with what :meth:`error` says."""
        error = self.error()
        if error:
            raise RuntimeError(
                f"flash-comm: {error}. Results since then are NaN. Look for that rank's own error; to go on in "
                "this process, let every rank call flashcomm_megatron.comm.fused.rebuild(group, transport)."
            )

    def close(self, group: dist.ProcessGroup) -> None:
        """Give everything back; every rank of the group must call it."""
        _release(self, self._inboxes, group)


_made: WeakKeyDictionary[dist.ProcessGroup, dict[str, Workspace | None]] = WeakKeyDictionary()  # by transport


def raise_errors(group: dist.ProcessGroup) -> None:
    """RuntimeError if a kernel of the group missed a rank: no later call of the group may pass in silence."""
    for made in _made.get(group, {}).values():
        if made is not None:
            made.raise_error()


def errors() -> list[str]:
    """What :meth:`Workspace.error` says of all groups, for stats()."""
    every = (made for by_transport in _made.values() for made in by_transport.values() if made is not None)
    return [error for error in (made.error() for made in every) if error]


def serving(
    group: dist.ProcessGroup, x: Tensor, plan: Any, transport: str, with_residuals: bool = False
) -> Workspace | None:
    """The workspace that runs this call whole, made with the group's first such call; None: use the process group.

    ``with_residuals``: the call also reads and updates residuals.
    """
    if x.device.type != "cuda" or not CHAINS[transport]:
        return None
    if group.size() not in WORLDS or len(plan.pieces) != 1 or not _kernel_of(plan, with_residuals):
        return None
    made = _of(group, x.device.index, transport)
    if made is not None and made.device != x.device.index:
        raise RuntimeError(
            f"flash-comm: this group's workspace was made on GPU {made.device}, by prepare() or an earlier call; found "
            f"a tensor on GPU {x.device.index}. Call torch.cuda.set_device({x.device.index}) before all of them."
        )
    return made


def _of(group: dist.ProcessGroup, device: int, transport: str) -> Workspace | None:
    """The group's workspace for ``transport``, made if there is none yet."""
    made = _made.setdefault(group, {})
    if transport not in made:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "flash-comm: the first collective of a group cannot be captured. Call "
                "flashcomm_megatron.collectives.prepare(group, config) before the capture, on every rank."
            )
        made[transport] = _make(group, device, transport)
    return made[transport]


def launch(
    made: Workspace, plan: Any, x: Tensor, out: Tensor, residuals: Sequence[Tensor] = (), **tests: Any
) -> Tensor:
    """Run a planned collective that :func:`serving` said ``made`` serves."""
    kernel = _kernel_of(plan, bool(residuals))
    assert kernel is not None
    return made.run(plan.algorithm, kernel, x, out, residuals, seconds=plan.seconds, **tests)


def _kernel_of(plan: Any, with_residuals: bool) -> Kernel | None:
    return _kernel(plan.reduce, plan.gather, plan.pieces[0].slices, plan.dtype, with_residuals)


@lru_cache(4096)
def _kernel(reduce: Any, gather: Any, slices: Any, dtype: torch.dtype, with_residuals: bool) -> Kernel | None:
    """The fused kernel for these legs, if there is one; it knows no rows: they must be whole blocks or super-blocks.

    Kernels of the codec alone do (csrc/cuda/rowed_codec.h).
    """
    cuda, codecs = native.cuda(), [codec.fitted(slices.width) for codec in (reduce, gather)]
    is_one_row = slices.length <= slices.width  # each slice
    if cuda is None or not all(codec.native and (is_one_row or slices.width % codec.unit == 0) for codec in codecs):
        return None
    legs = [cuda.Leg(*codec.native) for codec in codecs]
    fits = all(native.has_cuda_kernel(codec.native, dtype, slices.length, slices.width) for codec in codecs)
    if not fits or not cuda.has_collective(*legs, native.DTYPES[dtype], with_residuals):
        return None
    return Kernel(legs[0], legs[1], slices.length)


def prepare(group: dist.ProcessGroup, transport: str) -> Workspace | None:
    """Make the group's workspace now, before a capture. On every rank."""
    refuse_capture()
    return _of(group, torch.cuda.current_device(), transport)


def refuse_capture() -> None:
    """RuntimeError while the current stream is being captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("flash-comm: prepare() exchanges messages: call it before the capture, on every rank.")


def rebuild(group: dist.ProcessGroup, transport: str) -> Workspace | None:
    """Close the group's workspace and make a new one. On every rank."""
    close(group)
    return prepare(group, transport)


def close(group: dist.ProcessGroup) -> None:
    """Close the group's workspaces, if it has any. On every rank."""
    for made in _made.pop(group, {}).values():
        if made is not None:
            made.close(group)


# ---- making one -----------------------------------------------------------------------------------------------


def _make(group: dist.ProcessGroup, device: int, transport: str) -> Workspace | None:
    reasons: list[str] = []
    for name in CHAINS[transport]:
        made, reason = _try(name, group, device)
        if made is not None:
            _say(group, transport, reasons, name)
            return made
        reasons.append(f"{name}: {reason}")
    _say(group, transport, reasons, "group")
    return None


def _say(group: dist.ProcessGroup, asked: str, reasons: list[str], name: str) -> None:
    if reasons and group.rank() == 0:
        ranks = dist.get_process_group_ranks(group)
        messages.fell_back(f"transport {asked}", ranks, f"transport {name} ({'; '.join(reasons)})")


def _try(name: str, group: dist.ProcessGroup, device: int) -> tuple[Workspace | None, str]:
    """A workspace whose inboxes carried data between all ranks, or None and the reason; the same on every rank."""
    cuda = native.cuda()
    place, reason = _place(cuda, device)
    reason = votes.failure(reason, group)
    everyone = votes.gather(place, group)
    if not reason and len({place[20:] for place in everyone}) > 1:
        reason = "ranks on several machines"
    if cuda is None or reason:
        return None, reason
    blocks = _blocks([place[:20] for place in everyone])
    region = max(REGION_BYTES, blocks * cuda.slot_bytes())
    inboxes = INBOXES[name](cuda, device, cuda.inbox_bytes(group.size(), region), group)
    made: Workspace | None = None
    reason = inboxes.reason
    if not reason:
        try:
            made = Workspace(cuda, inboxes, group, device, blocks, region)
        except RuntimeError as error:
            reason = str(error)
        reason = votes.failure(reason, group)
    if made is not None and not reason:
        reason = votes.failure(_trial(made, group), group)
    if reason:
        _release(made, inboxes, group)
        return None, reason
    return made, ""


def _release(made: Workspace | None, inboxes: Any, group: dist.ProcessGroup) -> None:
    """Give back what was made so far, in step with all ranks of the group."""
    if made is not None:
        made.kernels.close()
    votes.gather(b"", group)  # nobody's kernels run any more
    inboxes.unmap()
    votes.gather(b"", group)  # nobody maps what is freed next
    inboxes.free()


def _place(cuda: ModuleType | None, device: int) -> tuple[bytes, str]:
    """16 bytes that name the GPU, 4 with the blocks it holds, then the machine; or why there are none."""
    if cuda is None:
        return b"", f"the extension has no CUDA kernels ({native.reason()})"
    try:
        blocks = int(cuda.device_blocks(device)).to_bytes(4, "little")
        return bytes(cuda.device_uuid(device) + blocks + shared_memory.machine().encode()), ""
    except RuntimeError as error:
        return b"", str(error)


def _blocks(places: Sequence[bytes]) -> int:
    """Thread blocks that every rank may launch, given that ranks on one GPU share it."""
    return max(1, min(int.from_bytes(place[16:], "little") // places.count(place) for place in places))


def _trial(made: Workspace, group: dist.ProcessGroup) -> str:
    """Gather known numbers, once through each region of the ring; why they did not all arrive, or nothing."""
    device, leg = torch.device("cuda", made.device), made.cuda.Leg(*KNOWN)
    try:
        for turn in range(REGIONS):
            parts = []  # integers from 0 to 255 that 8-bit blocks hold exactly, different for every rank and turn
            for rank in range(group.size()):
                x = (torch.arange(1 << 18, device=device) * (2 * rank + 3) + 7 * turn) % 256
                x[::32], x[1::32] = 0, 255
                parts.append(x.bfloat16())
            out = torch.full((len(parts) * parts[0].numel(),), torch.nan, dtype=torch.bfloat16, device=device)
            mine = parts[group.rank()]
            made.run("all_gather", Kernel(leg, leg, mine.numel()), mine, out, seconds=trial_seconds)
            torch.cuda.synchronize(made.device)
            made.raise_error()
            if not torch.equal(out, torch.cat(parts)):
                return "data written by a peer arrived changed"
    except RuntimeError as error:
        return str(error)
    return ""
