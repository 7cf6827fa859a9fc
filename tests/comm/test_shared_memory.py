"""Messages through shared memory: what arrives, in which order, what is heard of a rank that is lost."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import apart, spawn
from torch import Tensor

import flashcomm_megatron as fc
from flashcomm_megatron import collectives
from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.comm import shared_memory
from flashcomm_megatron.comm.communicator import Call, Communicator
from flashcomm_megatron.comm.shared_memory import SharedMemory

pytestmark = pytest.mark.skipif(extension.module() is None, reason="the extension is not built")

LARGE = 3 * shared_memory.RING_BYTES + 12345
HUGE = 1 << 26  # more than the rings hold
CALL = Call(1, "4f2a test", 0, 60.0)


def payload(source: int, to: int, size: int) -> Tensor:
    return ((torch.arange(size) * (source + 3) + 7 * to) % 251).to(torch.uint8)


def opened() -> SharedMemory:
    config = fc.Config(bits=4, transport="shared-memory")
    found = Communicator.of(dist.group.WORLD).transport(torch.device("cpu"), config)
    assert isinstance(found, SharedMemory)
    return found


def message(call: Callable[[], object]) -> str:
    with pytest.raises(RuntimeError) as error:
        call()
    return str(error.value)


# ---- what arrives -----------------------------------------------------------------------------------------------


def exchanges(rank: int, world: int) -> None:
    sizes = [[0, 1, 63, 65, LARGE][(3 * source + to) % 5] for source in range(world) for to in range(world)]
    ends, under_way = opened(), []
    for turn in range(3):  # all posted before any is waited for
        outs, ins = sizes[rank * world : (rank + 1) * world], sizes[rank::world]
        outbox = torch.cat([payload(rank, to, size) for to, size in enumerate(outs)])
        inbox = torch.zeros(sum(ins), dtype=torch.uint8)
        under_way.append((ends.exchange(outbox, outs, inbox, ins, CALL._replace(number=turn)), inbox.split(ins)))
        del outbox, inbox
    for transfer, receives in under_way if rank else reversed(under_way):
        transfer.wait()
        for source in range(world):
            if source != rank:
                assert torch.equal(receives[source], payload(source, rank, sizes[source * world + rank]))
    gathered = torch.zeros(world * LARGE, dtype=torch.uint8)
    gathered[rank * LARGE : (rank + 1) * LARGE] = payload(rank, 0, LARGE)
    ends.gather(gathered, gathered[rank * LARGE : (rank + 1) * LARGE], CALL).wait()
    assert torch.equal(gathered, torch.cat([payload(source, 0, LARGE) for source in range(world)]))


@pytest.mark.parametrize("world", [2, 3])
def test_messages_of_any_size_arrive_in_any_order_of_waiting(world: int) -> None:
    spawn(exchanges, world)


def same_as_group(rank: int, world: int) -> None:
    torch.manual_seed(rank)
    for numel in (8, 1000, 100_000, 2_000_000):
        x = torch.randn(numel, dtype=torch.bfloat16)
        results = []
        for transport in ("shared-memory", "group"):
            config = fc.Config(bits=4, transport=transport, min_bytes=0)
            handle = collectives.all_reduce(x.clone(), None, config, async_op=True)
            gathered = collectives.all_gather(x, None, config)
            results.append(torch.cat([handle.wait(), gathered]))
        assert torch.equal(*results)
        everyone = [torch.empty_like(results[0]) for _ in range(world)]
        dist.all_gather(everyone, results[0])
        assert all(torch.equal(each, results[0]) for each in everyone)
    assert opened().native is not None, "shared memory was used"


def test_same_bits_as_over_the_process_group() -> None:
    spawn(same_as_group, 3)


def cycles(rank: int, world: int) -> tuple[int, int]:

    def once() -> None:
        config = fc.Config(bits=4, transport="shared-memory", min_bytes=0)
        collectives.all_reduce(torch.ones(4096), None, config)
        Communicator.of(dist.group.WORLD).close()
        dist.barrier()

    once()
    before = len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("flash-comm")
    for _ in range(200):
        once()
    after = len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("flash-comm")
    assert before == after, f"{before} and {after}"
    assert not list(shared_memory.FOLDER.glob(f"flash-comm-{os.getpid()}-*"))
    return after


def test_nothing_is_left_behind() -> None:
    assert {maps for _, maps in spawn(cycles, 2)} == {0}


# ---- who does not come ------------------------------------------------------------------------------------------


def wait_for_the_end_of(process: int) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while ") Z" not in Path(f"/proc/{process}/stat").read_text():
            time.sleep(0.01)


def killed(rank: int, world: int, when: str) -> str | None:
    config = fc.Config(bits=4, transport="shared-memory", min_bytes=0)
    x = torch.randn(4_000_000 if when == "inside" else 10_000)
    collectives.all_reduce(x, None, config)
    processes = torch.zeros(world, 8, dtype=torch.uint8)
    processes[rank] = torch.tensor([os.getpid()]).view(torch.uint8)
    opened().gather(processes.view(-1), processes[rank], CALL).wait()  # read also if the sender is gone by then
    nothing = torch.empty(0, dtype=torch.uint8)
    if rank == 1:
        if when == "inside":
            opened().exchange(x.new_zeros(HUGE, dtype=torch.uint8), [HUGE, 0], nothing, [0, 0], CALL)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    if when == "inside":
        wait_for_the_end_of(int(processes[1].view(torch.int64)))  # else a quick reader could still take all of it
        inbox = torch.empty(HUGE, dtype=torch.uint8)
        text = message(opened().exchange(nothing, [0, 0], inbox, [0, HUGE], CALL).wait)
    else:
        text = message(lambda: collectives.all_reduce(x, None, config))
    assert time.monotonic() - started < 10, "not noticed by the timeout"
    assert "closed to further calls" in message(lambda: collectives.all_reduce(x, None, config))
    return text


@pytest.mark.parametrize("when", ["between", "inside"])
def test_a_killed_rank_is_named_at_once(when: str) -> None:
    survivor, _ = spawn(killed, 2, when, lost=[1])
    assert "the process of rank 1 has ended" in survivor


def absent(rank: int, world: int) -> str | None:
    config = fc.Config(bits=4, transport="shared-memory", min_bytes=0, timeout=1.0)
    collectives.all_reduce(torch.ones(100_000), None, config)
    if rank == 2:
        time.sleep(4)
        return None
    return message(lambda: collectives.all_reduce(torch.ones(100_000), None, config))


def test_a_rank_that_never_calls_is_named_after_the_timeout() -> None:
    first, second, _ = spawn(absent, 3, lost=[2])
    texts = first + second
    assert "rank 2 neither sent nor took anything for 1 s" in texts
    assert "all_reduce [100000] float32" in first


def other_call(rank: int, world: int) -> str:
    config = fc.Config(bits=4, transport="shared-memory", min_bytes=0)
    shape = (64, 64) if rank == 0 else (64, 128)
    return message(lambda: collectives.all_reduce(torch.ones(shape), None, config))


def test_ranks_in_different_calls_hear_of_each_other() -> None:
    texts = spawn(other_call, 2)
    assert any("[64, 128]" in text and "[64, 64]" in text and "same order" in text for text in texts)


def interrupted(rank: int, world: int) -> float:
    config = fc.Config(bits=4, transport="shared-memory", min_bytes=0, timeout=30)
    collectives.all_reduce(torch.ones(1000), None, config)
    if rank == 1:
        time.sleep(3)
        return 0.0
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # what Ctrl-C does, a second from now
    signal.alarm(1)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        collectives.all_reduce(torch.ones(1000), None, config)
    return time.monotonic() - started


def test_ctrl_c_does_not_wait_for_the_timeout() -> None:
    assert 0.9 < spawn(interrupted, 2, lost=[1])[0] < 20


def dropped(rank: int, world: int, transport: str) -> None:
    config = fc.Config(bits=4, transport=transport, min_bytes=0, timeout=60)
    for _ in range(3):
        collectives.all_reduce(torch.ones(100_000), None, config, async_op=True)  # its handle is dropped
    dist.barrier()
    assert torch.equal(collectives.all_reduce(torch.ones(1000), None, config), torch.full((1000,), 2.0))


@pytest.mark.parametrize("transport", ["shared-memory", "group"])
def test_a_dropped_handle_harms_nobody(transport: str) -> None:
    spawn(dropped, 2, transport)


def fork(rank: int, world: int) -> int:
    config = fc.Config(bits=4, transport="shared-memory", min_bytes=0)
    collectives.all_reduce(torch.ones(10_000), None, config)
    child = os.fork()
    if child == 0:
        refused = "forked child" in message(lambda: collectives.all_reduce(torch.ones(10_000), None, config))
        os._exit(0 if refused else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    collectives.all_reduce(torch.ones(10_000), None, config)
    return status


def test_a_forked_child_is_refused_and_does_no_harm() -> None:
    assert spawn(fork, 2) == [0, 0]


def no_room(rank: int, world: int) -> Tensor:
    def full(size: int) -> shared_memory.Segment:
        raise OSError(28, "No space left on device")

    if rank == 1:
        shared_memory.create = full
    config = fc.Config(bits=4, transport="shared-memory", min_bytes=0)
    return collectives.all_reduce(torch.ones(10_000), None, config)


def test_without_room_all_ranks_use_the_process_group() -> None:
    assert all(torch.equal(each, torch.full((10_000,), 2.0)) for each in spawn(no_room, 2))


# ---- several machines -------------------------------------------------------------------------------------------


def far(rank: int, world: int) -> Tensor:
    apart(rank)
    config = fc.Config(bits=4, min_bytes=0)
    summed = collectives.all_reduce(torch.ones(10_000), None, config)
    assert Communicator.of(dist.group.WORLD)._shared is None
    with pytest.raises(RuntimeError, match="shared-memory does not serve: the ranks are on several machines"):
        collectives.all_reduce(torch.ones(10_000), None, fc.Config(bits=4, transport="shared-memory", strict=True))
    return summed


def test_ranks_on_several_machines_use_the_process_group() -> None:
    assert all(torch.equal(each, torch.full((10_000,), 2.0)) for each in spawn(far, 2))


def many_groups(rank: int, world: int) -> str:
    def full(size: int) -> shared_memory.Segment:
        raise OSError(28, "No space left on device")

    shared_memory.create = full
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for _ in range(3):
            collectives.all_reduce(torch.ones(5000), dist.new_group(), fc.Config(bits=4))
    return printed.getvalue()


def test_a_fallback_is_one_line_however_many_groups_there_are() -> None:
    first, second = spawn(many_groups, 2)
    assert first.count("\n") == 1 and not second
    assert "no shared memory between ranks 0 and 1" in first and "No space left on device" in first
