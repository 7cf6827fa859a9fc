"""Several groups at once: side by side, sharing ranks, from several threads, and put away in any order."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import spawn

from flashcomm_megatron import collectives
from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.collectives import handle as calls
from flashcomm_megatron.comm import shared_memory
from flashcomm_megatron.comm.communicator import Communicator
from flashcomm_megatron.config import Config

pytestmark = pytest.mark.skipif(extension.module() is None, reason="the extension is not built")

HOST = Config(bits=8, transport="shared-memory", min_bytes=0, timeout=60)
LARGE = 2_000_000  # values: payloads of several rings


def sums(group: dist.ProcessGroup, value: float, numel: int = LARGE) -> calls.Handle:
    """An all-reduce of a constant, which every width carries exactly, under way."""
    return collectives.all_reduce(torch.full((numel,), value), group, HOST, async_op=True)


def circle(rank: int, world: int) -> None:
    """Each rank shares a group with each other one, and waits first where its peer waits last."""
    pairs = [(0, 1), (1, 2), (0, 2)]
    groups = {pair: dist.new_group(list(pair)) for pair in pairs}
    first = {0: (0, 1), 1: (1, 2), 2: (0, 2)}[rank]
    mine = [pair for pair in pairs if rank in pair]
    for turn in range(3):
        handles = {pair: sums(groups[pair], 10.0 * rank + turn) for pair in mine}
        for pair in sorted(mine, key=lambda pair: pair != first):
            expected = sum(10.0 * r + turn for r in pair)
            assert torch.equal(handles[pair].wait(), torch.full((LARGE,), expected))


def test_groups_that_share_ranks_move_each_others_messages() -> None:
    spawn(circle, 3)


def stages(rank: int, world: int) -> list[float]:
    """Two stages of two ranks: each sums in a group of its own, and the first hands its sums to the second."""
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    last = []
    for turn in range(4):
        x = torch.full((LARGE // 2,), 1.0 + turn + rank % 2)
        if rank >= 2:
            dist.recv(x, rank - 2)
        handle = collectives.all_reduce(x, group, HOST, async_op=True)
        collectives.all_reduce(torch.ones(1000 + rank // 2), group, HOST)  # stages make different calls
        x = handle.wait()
        if rank < 2:
            dist.send(x, rank + 2)
        assert x.min() == x.max()
        last.append(float(x[0]))
    return last


def test_a_group_for_each_pipeline_stage() -> None:
    sums = [2.0 * turn + 3 for turn in range(4)]
    assert spawn(stages, 4) == [sums, sums, [2 * each for each in sums], [2 * each for each in sums]]


def in_threads(rank: int, world: int) -> list[str]:
    """Eight calls in each of two threads, each on a group of its own; then both threads on one group."""
    groups = [dist.new_group([0, 1]) for _ in range(3)]
    wrong: list[str] = []

    def calls(group: dist.ProcessGroup, numel: int) -> None:
        try:
            for turn in range(8):
                found = sums(group, float(turn + rank), numel).wait()
                if not torch.equal(found, torch.full((numel,), 2.0 * turn + 1)):
                    wrong.append(f"{numel}, turn {turn}: {found[:3]}")
        except RuntimeError as error:
            if group is not groups[2] or "rank" not in str(error):
                wrong.append(str(error))

    for pair in (groups[:2], [groups[2]] * 2):
        for group in pair:
            collectives.all_reduce(torch.ones(8), group, HOST)
        threads = [threading.Thread(target=calls, args=(group, 300_000 + i)) for i, group in enumerate(pair)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return wrong


def test_threads_on_groups_of_their_own_and_on_one_get_right_results_or_an_error() -> None:
    assert spawn(in_threads, 2) == [[], []]


def put_away(rank: int, world: int) -> None:
    """Streams before their group, after it, and never; a handle that outlives both."""
    for turn in range(4):
        group = dist.new_group([0, 1])
        handle = sums(group, 1.0)
        assert torch.equal(sums(group, 2.0).wait(), torch.full((LARGE,), 4.0))
        if turn == 0:
            Communicator.of(group).close()
            dist.destroy_process_group(group)
        elif turn == 1:
            dist.destroy_process_group(group)
            Communicator.of(group).close()
        elif turn == 2:
            dist.destroy_process_group(group)
        assert torch.equal(handle.wait(), torch.full((LARGE,), 2.0))


def test_groups_can_be_closed_in_any_order() -> None:
    spawn(put_away, 2)


def without_shared_memory(rank: int, world: int) -> torch.Tensor:
    if rank == 1:
        shared_memory.FOLDER = Path("/nowhere")
    return sums(dist.group.WORLD, 1.0).wait()


def test_without_shared_memory_on_one_rank_all_use_the_process_group() -> None:
    assert all(torch.equal(each, torch.full((LARGE,), 2.0)) for each in spawn(without_shared_memory, 2))


def outside(rank: int, world: int) -> list[str]:
    """What a rank hears that calls a group of others, with a tensor below and above the minimum size."""
    group, heard = dist.new_group([0]), []
    for numel in (4, 40_000) if rank else ():
        with pytest.raises(ValueError, match="no member of the group") as error:
            collectives.all_reduce(torch.ones(numel), group, Config(bits=8, min_bytes=1024))
        heard.append(str(error.value))
    return heard


def test_a_rank_outside_of_a_group_hears_the_same_whatever_the_size() -> None:
    _, heard = spawn(outside, 2)
    assert len(heard) == 2 and len(set(heard)) == 1
