"""Run one function on N ranks over gloo and collect what each rank returned; a rank that hangs fails the test.

``fn`` must be a module-level function ``fn(rank, world, *args)``. An exception on any rank is raised here with that
rank's traceback; ranks still waiting after ``seconds`` (more on a busy machine: patience.py) are killed and named.
Ranks that are meant to be ``lost`` leave no result.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from patience import Deadline

# Imported once, not once per rank. What stands behind the first two is most of what importing Megatron takes.
PRELOADED = [
    "torch.distributed",
    "flashcomm_megatron",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "wandb",
]


def spawn(
    fn: Callable[..., Any], world: int, *args: Any, seconds: float = 120.0, lost: Collection[int] = ()
) -> list[Any]:
    """Results of ``fn(rank, world, *args)`` for every rank, in rank order."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        deadline = Deadline(seconds)
        ranks = [
            context.Process(target=_run, args=(fn, rank, world, folder, deadline.left(), args, bool(lost)), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        stuck = _join(ranks, deadline)
        failures = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if failures:
            raise AssertionError("\n".join(f"{path.name}:\n{path.read_text()}" for path in failures))
        if stuck:
            raise AssertionError(f"ranks {stuck} of {world} did not end within {deadline.allowed:.0f} s")
        return [
            None if rank in lost else _result(Path(folder) / f"result-{rank}", process.exitcode)
            for rank, process in enumerate(ranks)
        ]


def apart(rank: int) -> None:
    """Let this rank's group take every rank to be on a machine of its own; called before the group's first use."""
    from flashcomm_megatron.comm import shared_memory

    shared_memory.machine = lambda: f"machine {rank}"


def _join(ranks: list[Any], deadline: Deadline) -> list[int]:
    """Wait for every process until the deadline; kill and return those that did not end."""
    for process in ranks:
        while process.is_alive() and deadline.left():
            process.join(min(1.0, deadline.left()))
    stuck = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in stuck:
        ranks[rank].kill()
        ranks[rank].join()
    return stuck


def _result(path: Path, exitcode: int | None) -> Any:
    assert path.exists(), f"{path.name} was never written; the process ended with exit code {exitcode}"
    return pickle.loads(path.read_bytes())


def _run(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    folder: str,
    seconds: float,
    args: tuple[Any, ...],
    some_are_lost: bool,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(f"{folder}/store", world),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=seconds),
        )
        result = fn(rank, world, *args)
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(result))
        if not some_are_lost:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
