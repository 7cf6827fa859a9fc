"""Streams over shared memory and connections: what arrives, in which order, what is heard of a rank that is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
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
from flashcomm_megatron.comm import links, segment, sockets, streams, votes

pytestmark = pytest.mark.skipif(extension.module() is None, reason="the extension is not built")

LARGE = 3 * streams.RING_BYTES + 12345
HUGE = 1 << 26  # more than a kernel keeps for a connection


over = pytest.mark.parametrize("where", ["one machine", "several machines"])


def settle(rank: int, where: str) -> None:
    if where == "several machines":
        apart(rank)


def payload(source: int, to: int, size: int) -> Tensor:
    return ((torch.arange(size) * (source + 3) + 7 * to) % 251).to(torch.uint8)


def opened(seconds: float = 60.0) -> links.Link:
    config = fc.Config(bits=4, transport="host", timeout=seconds)
    return links.link(dist.group.WORLD, torch.device("cpu"), config, "test")


def message(call: Callable[[], object]) -> str:
    with pytest.raises(RuntimeError) as error:
        call()
    return str(error.value)


# ---- what arrives -----------------------------------------------------------------------------------------------


def exchanges(rank: int, world: int, where: str) -> None:
    settle(rank, where)
    sizes = [[0, 1, 63, 65, LARGE][(3 * source + to) % 5] for source in range(world) for to in range(world)]
    link = opened()
    under_way = []
    for _ in range(3):  # all posted before any is waited for
        sends = [payload(rank, to, sizes[rank * world + to]) for to in range(world)]
        receives = [torch.zeros(sizes[source * world + rank], dtype=torch.uint8) for source in range(world)]
        under_way.append((link.exchange(sends, receives), receives))
        del sends
    for transfers, receives in under_way if rank else reversed(under_way):
        for transfer in transfers:
            transfer.wait()
        for source in range(world):
            if source != rank:
                assert torch.equal(receives[source], payload(source, rank, sizes[source * world + rank]))


@over
@pytest.mark.parametrize("world", [2, 3])
def test_messages_of_any_size_arrive_in_any_order_of_waiting(world: int, where: str) -> None:
    spawn(exchanges, world, where)


def same_as_group(rank: int, world: int, where: str) -> None:
    settle(rank, where)
    torch.manual_seed(rank)
    for numel in (8, 1000, 100_000, 2_000_000):
        x = torch.randn(numel, dtype=torch.bfloat16)
        results = []
        for transport in ("host", "group"):
            config = fc.Config(bits=4, transport=transport, min_bytes=0)
            handle = collectives.all_reduce(x.clone(), None, config, async_op=True)
            gathered = collectives.all_gather(x, None, config)
            results.append(torch.cat([handle.wait(), gathered]))
        assert torch.equal(*results)
        everyone = [torch.empty_like(results[0]) for _ in range(world)]
        dist.all_gather(everyone, results[0])
        assert all(torch.equal(each, results[0]) for each in everyone)
    assert links._open(dist.group.WORLD).native is not None, "streams were used"


@over
def test_same_bits_as_over_the_process_group(where: str) -> None:
    spawn(same_as_group, 3, where)


def cycles(rank: int, world: int, where: str) -> tuple[int, int]:
    settle(rank, where)

    def once() -> None:
        config = fc.Config(bits=4, transport="host", min_bytes=0)
        collectives.all_reduce(torch.ones(4096), None, config)
        links.close(dist.group.WORLD)
        dist.barrier()

    once()
    before = len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("flash-comm")
    for _ in range(200):
        once()
    after = len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("flash-comm")
    assert before == after
    assert not list(segment.FOLDER.glob(f"flash-comm-{os.getpid()}-*"))
    return after


@over
def test_nothing_is_left_behind(where: str) -> None:
    assert {maps for _, maps in spawn(cycles, 2, where)} == {0}


# ---- who does not come ------------------------------------------------------------------------------------------


def wait_for_the_end_of(process: int) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while ") Z" not in Path(f"/proc/{process}/stat").read_text():
            time.sleep(0.01)


def killed(rank: int, world: int, where: str, when: str) -> str | None:
    settle(rank, where)
    config = fc.Config(bits=4, transport="host", min_bytes=0)
    x = torch.randn(4_000_000 if when == "inside" else 10_000)
    collectives.all_reduce(x, None, config)
    mine, theirs = torch.tensor([os.getpid()]).view(torch.uint8), torch.empty(8, dtype=torch.uint8)
    for transfer in opened().exchange([mine, mine], [theirs, theirs]):  # read also if the sender is gone by then
        transfer.wait()
    if rank == 1:
        if when == "inside":
            link = opened()
            empty = x.new_empty(0, dtype=torch.uint8)
            link.exchange([x.new_zeros(HUGE, dtype=torch.uint8), empty], [empty, empty])
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    if when == "inside":
        wait_for_the_end_of(int(theirs.view(torch.int64)))  # else a quick reader could still take all of it
        link, empty = opened(), x.new_empty(0, dtype=torch.uint8)
        (transfer,) = link.exchange([empty, empty], [empty, torch.empty(HUGE, dtype=torch.uint8)])
        text = message(transfer.wait)
    else:
        text = message(lambda: collectives.all_reduce(x, None, config))
    assert time.monotonic() - started < 10, "not noticed by the timeout"
    assert "closed to further calls" in message(lambda: collectives.all_reduce(x, None, config))
    return text


@over
@pytest.mark.parametrize("when", ["between", "inside"])
def test_a_killed_rank_is_named_at_once(where: str, when: str) -> None:
    survivor, _ = spawn(killed, 2, where, when, lost=[1])
    seen = {"one machine": "the process of rank 1 has ended", "several machines": "rank 1 has closed its connection"}
    assert seen[where] in survivor


def absent(rank: int, world: int, where: str) -> str | None:
    settle(rank, where)
    config = fc.Config(bits=4, transport="host", min_bytes=0, timeout=1.0)
    collectives.all_reduce(torch.ones(100_000), None, config)
    if rank == 2:
        time.sleep(4)
        return None
    return message(lambda: collectives.all_reduce(torch.ones(100_000), None, config))


@over
def test_a_rank_that_never_calls_is_named_after_the_timeout(where: str) -> None:
    first, second, _ = spawn(absent, 3, where, lost=[2])
    texts = first + second
    assert "rank 2 neither sent nor took anything for 1 s" in texts
    assert "all_reduce [100000] float32" in first


def other_call(rank: int, world: int) -> str:
    config = fc.Config(bits=4, transport="host", min_bytes=0)
    shape = (64, 64) if rank == 0 else (64, 128)
    return message(lambda: collectives.all_reduce(torch.ones(shape), None, config))


def test_ranks_in_different_calls_hear_of_each_other() -> None:
    texts = spawn(other_call, 2)
    assert any("[64, 128]" in text and "[64, 64]" in text and "same order" in text for text in texts)


def interrupted(rank: int, world: int, where: str) -> float:
    settle(rank, where)
    config = fc.Config(bits=4, transport="host", min_bytes=0, timeout=30)
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


@over
def test_ctrl_c_does_not_wait_for_the_timeout(where: str) -> None:
    assert 0.9 < spawn(interrupted, 2, where, lost=[1])[0] < 20


def dropped(rank: int, world: int, where: str, transport: str) -> None:
    settle(rank, where)
    config = fc.Config(bits=4, transport=transport, min_bytes=0, timeout=60)
    for _ in range(3):
        collectives.all_reduce(torch.ones(100_000), None, config, async_op=True)  # its handle is dropped
    dist.barrier()
    assert torch.equal(collectives.all_reduce(torch.ones(1000), None, config), torch.full((1000,), 2.0))


@over
@pytest.mark.parametrize("transport", ["host", "group"])
def test_a_dropped_handle_harms_nobody(where: str, transport: str) -> None:
    spawn(dropped, 2, where, transport)


def fork(rank: int, world: int, where: str) -> int:
    settle(rank, where)
    config = fc.Config(bits=4, transport="host", min_bytes=0)
    collectives.all_reduce(torch.ones(10_000), None, config)
    child = os.fork()
    if child == 0:
        refused = all(each.fileno() < 0 for each in sockets._open) and "forked child" in message(
            lambda: collectives.all_reduce(torch.ones(10_000), None, config)
        )
        os._exit(0 if refused else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    collectives.all_reduce(torch.ones(10_000), None, config)
    return status


@over
def test_a_forked_child_is_refused_and_does_no_harm(where: str) -> None:
    assert spawn(fork, 2, where) == [0, 0]


def no_room(rank: int, world: int) -> Tensor:
    def full(size: int) -> segment.Segment:
        raise OSError(28, "No space left on device")

    if rank == 1:
        segment.create = full
    config = fc.Config(bits=4, transport="host", min_bytes=0)
    return collectives.all_reduce(torch.ones(10_000), None, config)


def test_without_room_all_ranks_use_the_process_group() -> None:
    assert all(torch.equal(each, torch.full((10_000,), 2.0)) for each in spawn(no_room, 2))


# ---- several machines -------------------------------------------------------------------------------------------


def two_by_two(rank: int, world: int) -> Tensor:
    segment.machine = lambda: f"machine {rank // 2}"
    x = torch.randn(700_000, generator=torch.Generator().manual_seed(rank))
    results = []
    for transport in ("host", "group"):
        config = fc.Config(bits=4, transport=transport, min_bytes=0)
        results.append(collectives.all_reduce(x.clone(), None, config))
    assert torch.equal(*results)
    ends = links._open(dist.group.WORLD)
    assert sorted(ends._segments) == [rank // 2 * 2, rank // 2 * 2 + 1], "shared memory inside a machine"
    assert sorted(ends._connections) == sorted({0, 1, 2, 3} - {*ends._segments}), "connections to the other"
    return results[0]


def test_shared_memory_inside_machines_and_connections_between() -> None:
    results = spawn(two_by_two, 4)
    assert all(torch.equal(each, results[0]) for each in results)


def with_strangers(rank: int, world: int) -> Tensor:
    """Before the other rank connects, somebody does who knows nothing, and somebody who knows everything but the
    password."""
    apart(rank)
    listen = socket.create_server

    def visited(*args: object, **kwargs: object) -> socket.socket:
        listener = listen(*args, **kwargs)
        for words in (b"", sockets.GREETING.pack(bytes(sockets.PASSWORD_BYTES), 1)):
            with socket.create_connection(listener.getsockname()[:2]) as stranger:
                stranger.sendall(words)
        return listener

    socket.create_server = visited
    config = fc.Config(bits=4, transport="host", min_bytes=0, strict=True)
    return collectives.all_reduce(torch.ones(10_000), None, config)


def test_strangers_are_turned_away() -> None:
    assert all(torch.equal(each, torch.full((10_000,), 2.0)) for each in spawn(with_strangers, 2))


def unreachable(rank: int, world: int) -> tuple[Tensor, str]:
    apart(rank)
    sockets.SECONDS, sockets.address = 0.5, lambda: "127.0.0.1"
    if rank == 0:
        gather = votes.gather  # rank 0 listens at one address and tells another
        votes.gather = lambda message, group: gather(message.replace(b" 127.0.0.1 ", b" 127.0.0.2 "), group)
    config = fc.Config(bits=4, transport="auto", min_bytes=0)
    summed = collectives.all_reduce(torch.ones(10_000), None, config)
    return summed, links._open(dist.group.WORLD).reason


def test_without_connections_all_ranks_use_the_process_group() -> None:
    for summed, reason in spawn(unreachable, 2):
        assert torch.equal(summed, torch.full((10_000,), 2.0))
        assert reason.startswith("rank ") and "no connection to another machine within 0.5 s" in reason


def test_the_address_is_that_of_gloos_interface_or_towards_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert sockets.address() == "127.0.0.1"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert sockets.address() == "127.0.0.1"
    if socket.has_ipv6 and Path("/proc/net/if_inet6").read_text():
        monkeypatch.setenv("MASTER_ADDR", "::1")
        assert sockets.address() == "::1"
        with sockets._listen("::1", 1) as listener:
            told = f"{bytes(sockets.PASSWORD_BYTES).hex()} ::1 {listener.getsockname()[1]}"
            sockets._call(told, 0, time.monotonic() + 5).close()
