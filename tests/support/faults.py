"""Everything that can go wrong between ranks, as a table: what happens, and what the others must be told.

A fault is a function ``fault(here)`` that runs on every rank of a fresh group after one healthy call; ``VICTIM`` does
the wrong thing, all others return what they heard. Those that end a process run in groups of two, side by side. All
transports see all of them. test_faults.py asserts the texts, benchmarks/fault_table.py writes down how long each took.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from flashcomm_megatron import collectives
from flashcomm_megatron.comm import shared_memory, stalls
from flashcomm_megatron.config import Config
from flashcomm_megatron.observe import messages

TRANSPORTS = ("shared memory", "process group")
VICTIM = 1
PATIENCE = 0.3  # seconds between two looks at groups that stand still
WAIT = 2.0  # seconds that a rank waits here for one that does nothing
LARGE = 4_000_000  # values: a payload larger than a ring


class Here(NamedTuple):
    """One rank's place in one fault."""

    group: dist.ProcessGroup
    config: Config
    is_victim: bool
    processes: list[int]  # of the group's ranks

    def all_reduce(self, numel: int = 10_000, dtype: torch.dtype = torch.float32, **options: object) -> torch.Tensor:
        """A call as every rank makes it, but for what is said otherwise."""
        return collectives.all_reduce(torch.ones(numel, dtype=dtype), self.group, replace(self.config, **options))


@dataclass
class Heard:
    """The error of a rank, empty where it had none, and after how many seconds; and what it was warned of."""

    text: str = ""
    seconds: float = 0.0
    warned: str = ""


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    """Note the error of the block."""
    heard, started = Heard(), time.monotonic()
    messages.warn = lambda line: setattr(heard, "warned", heard.warned + line)
    try:
        yield heard
    except RuntimeError as error:
        heard.text = str(error)
    heard.seconds = time.monotonic() - started


# ---- the process lives ------------------------------------------------------------------------------------------


def other_shape(here: Here) -> None:
    here.all_reduce(20_000 if here.is_victim else 10_000)


def other_dtype(here: Here) -> None:
    here.all_reduce(dtype=torch.bfloat16 if here.is_victim else torch.float32)


def other_collective(here: Here) -> None:
    call = collectives.all_gather if here.is_victim else collectives.all_reduce
    call(torch.ones(10_000), here.group, here.config)


def missed_a_call(here: Here) -> None:
    if not here.is_victim:
        here.all_reduce()
    here.all_reduce()


def other_bits(here: Here) -> None:
    here.all_reduce(bits=8 if here.is_victim else 4)


def back_to_other_bits(here: Here) -> None:
    here.all_reduce(bits=8)  # on all ranks: agreed
    here.all_reduce(bits=4 if here.is_victim else 8)


def all_change_differently(here: Here) -> None:
    here.all_reduce(bits=5 if here.is_victim else 8)


def defers_what_others_compress(here: Here) -> None:
    here.all_reduce(min_bytes=1 << 30 if here.is_victim else 0)


def compresses_what_others_defer(here: Here) -> None:
    here.all_reduce(100, min_bytes=1 << 20)  # on all ranks
    here.all_reduce(100, min_bytes=0 if here.is_victim else 1 << 20)


def switched_off(here: Here) -> None:
    if here.is_victim:
        dist.all_reduce(torch.ones(10_000), group=here.group)
    else:
        here.all_reduce()


def never_calls(here: Here) -> None:
    if not here.is_victim:
        here.all_reduce()


def fails_alone(here: Here) -> None:
    """The victim's script catches what strict raised, and its process lives on."""
    if not here.is_victim:
        here.all_reduce()
        return
    with contextlib.suppress(RuntimeError):
        messages.unexpected("its options were changed", replace(here.config, strict=True))
    time.sleep(WAIT)
    messages._failed = messages._raised = None


def stopped(here: Here) -> None:
    """The victim asks for nothing: rank 0 stops it and lets it go on once it heard."""
    victim = here.processes[VICTIM]
    first = here.group.rank() == 0
    if first:
        os.kill(victim, signal.SIGSTOP)
        while ") T" not in Path(f"/proc/{victim}/stat").read_text():
            time.sleep(0.01)
    try:
        if not here.is_victim or time.sleep(0.5) is None:
            here.all_reduce()
    finally:
        if first:
            os.kill(victim, signal.SIGCONT)


# ---- the process ends -------------------------------------------------------------------------------------------


def killed_before(here: Here) -> None:
    """Before the group's first call: there has been no healthy one."""
    if here.is_victim:
        os.kill(os.getpid(), signal.SIGKILL)
    here.all_reduce()


def killed_between(here: Here) -> None:
    if here.is_victim:
        os.kill(os.getpid(), signal.SIGKILL)
    here.all_reduce()


def killed_inside(here: Here) -> None:
    """Of two legs: the victim posted the first and dies."""
    if here.is_victim:
        x = torch.ones(LARGE)
        collectives.all_reduce(x, here.group, replace(here.config, algorithm="two-step"), async_op=True)
        os.kill(os.getpid(), signal.SIGKILL)
    here.all_reduce(LARGE, algorithm="two-step")


def raised(here: Here) -> None:
    """An error in the victim's forward ends its process in the ordinary way."""
    if not here.is_victim:
        here.all_reduce()


class Fault(NamedTuple):
    """``told``: words that some rank must hear, by transport; every survivor has an error."""

    name: str
    happens: Callable[[Here], None]
    told: tuple[str, str]  # by transport
    is_first_call: bool = False


ANOTHER = "rank 1 is in another call"
SILENT = "rank 1 neither sent nor took"
OTHER_CALL = "rank 1 is in another call (#2/"
NO_MESSAGE = "no message passed between this rank and rank 1"
NOTHING = f"rank 1 neither sent nor took anything for {WAIT:g} s"
MADE = "rank 1 made "
GIVEN_UP = "rank 1 has given up before this call: flash-comm is on (4-bit) but its options were changed"
DEFERRED = "float32, deferred (below 1048576 bytes) while rank 1 made "
ENDED = "the process of rank {victim} has ended"
NO_MESSAGE_OF = "no message passed between this rank and rank {victim}"

LIVES = (
    Fault("calls with another shape", other_shape, (OTHER_CALL, MADE)),
    Fault("calls with another dtype", other_dtype, (OTHER_CALL, MADE)),
    Fault("calls another collective", other_collective, (OTHER_CALL, MADE)),
    Fault("misses one call and goes on", missed_a_call, (SILENT, NO_MESSAGE)),
    Fault("changes its configuration alone", other_bits, ("(#0/", MADE + "change of configuration")),
    Fault("goes back to an earlier configuration alone", back_to_other_bits, (ANOTHER, MADE)),
    Fault("changes it to another one than the others", all_change_differently, ("rank 1: flashcomm",) * 2),
    Fault("defers what others compress", defers_what_others_compress, ("(#0/", MADE)),
    Fault("compresses what others defer", compresses_what_others_defer, (DEFERRED,) * 2),
    Fault("has FLASH_COMM_DISABLE set", switched_off, ("is flash-comm on at every rank?",) * 2, is_first_call=True),
    Fault("never calls", never_calls, (NOTHING, NO_MESSAGE)),
    Fault("fails alone with --flash-comm-strict", fails_alone, (GIVEN_UP,) * 2),
    Fault("is stopped (SIGSTOP)", stopped, (NOTHING, NO_MESSAGE)),
)
ENDS = (
    Fault("is killed before its first call", killed_before, (NO_MESSAGE_OF,) * 2, is_first_call=True),
    Fault("is killed between two calls", killed_between, (ENDED, NO_MESSAGE_OF)),
    Fault("is killed between the legs of a call", killed_inside, (ENDED, NO_MESSAGE_OF)),
    Fault("raises in its forward", raised, (ENDED, NO_MESSAGE_OF)),
)


# ---- running them -----------------------------------------------------------------------------------------------


def _place(group: dist.ProcessGroup, transport: str, is_victim: bool) -> Here:
    mine = torch.tensor([os.getpid()])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    config = Config(
        bits=4, transport="group" if transport == "process group" else "shared-memory", min_bytes=0, timeout=WAIT
    )
    return Here(group, config, is_victim, [int(each) for each in everyone])


def _meet(fault: Fault, here: Here) -> Heard:
    if not fault.is_first_call:
        here.all_reduce()
    dist.barrier(here.group)
    dist.barrier()  # nobody is inside the group's when the first rank closes its connections
    with listening() as heard:
        fault.happens(here)
    return heard


def alive(rank: int, world: int, transport: str) -> dict[str, Heard]:
    """What this rank heard of every fault in which all processes live on, each in a group of its own."""
    stalls.PATIENCE, heard = PATIENCE, {}
    for fault in LIVES:
        group = dist.new_group(timeout=dist.distributed_c10d.timedelta(seconds=2 * WAIT))
        assert group is not None
        heard[fault.name] = _meet(fault, _place(group, transport, rank == VICTIM))
        dist.barrier()
        dist.destroy_process_group(group)
    assert not list(shared_memory.FOLDER.glob(f"flash-comm-{os.getpid()}-*"))
    return heard


def ending(rank: int, world: int, transport: str) -> Heard | None:
    """Ranks 2i and 2i + 1 meet the i-th fault that ends the process of the latter."""
    groups = [dist.new_group([2 * i, 2 * i + 1]) for i in range(len(ENDS))]
    here = _place(groups[rank // 2], transport, rank % 2 == VICTIM)
    heard = _meet(ENDS[rank // 2], here)
    return None if here.is_victim else heard
