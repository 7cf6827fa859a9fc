"""Run one function on N ranks over gloo and collect what each rank returned; a rank that hangs fails the test.

``fn`` must be a module-level function ``fn(rank, world, *args)``. An exception on any rank is raised here with that
rank's traceback; ranks still waiting after ``seconds`` (more on a busy machine: patience.py) are killed and named.
Ranks that are meant to be ``lost`` leave no result. ``kind`` is that of forks.py: ``forks.MEGATRON`` for ranks in which
Megatron-Core may be imported before they start.
"""

from __future__ import annotations

import datetime
import multiprocessing.spawn
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from patience import Deadline


def spawn(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    seconds: float = 120.0,
    lost: Collection[int] = (),
    kind: str = forks.RANKS,
) -> list[Any]:
    """Results of ``fn(rank, world, *args)`` for every rank, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((fn, args)))
        deadline = Deadline(seconds)
        call = {"world": world, "folder": folder, "seconds": deadline.left(), "some_are_lost": bool(lost)}
        call["script"] = sys.modules["__main__"].__file__ if fn.__module__ == "__main__" else None
        request = {"call": call, "path": sys.path, "folder": os.getcwd(), "environment": dict(os.environ)}
        codes = forks.run(kind, request | {"together": False}, world, deadline)
        failures = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if failures:
            raise AssertionError("\n".join(f"{path.name}:\n{path.read_text()}" for path in failures))
        if stuck := [rank for rank, code in codes.items() if code is None]:
            raise AssertionError(f"ranks {stuck} of {world} did not end within {deadline.allowed:.0f} s")
        return [
            None if rank in lost else _result(Path(folder) / f"result-{rank}", codes[rank]) for rank in range(world)
        ]


def once(fn: Callable[..., Any], world: int, **options: Any) -> Any:
    """A fixture: the results of ``spawn``, made once for all tests of a file."""

    @pytest.fixture(scope="module")
    def seen() -> list[Any]:
        return spawn(fn, world, **options)

    return seen


def apart(rank: int) -> None:
    """Let this rank's group take every rank to be on a machine of its own; called before the group's first use."""
    from flashcomm_megatron.comm import shared_memory

    shared_memory.machine = lambda: f"machine {rank}"


def tensor_parallel(world: int, scripts: bool = False) -> Any:
    """Make this rank, in CPU mode, one of a tensor-parallel group of all ranks; returns Megatron's parallel_state."""
    from flashcomm_megatron import cpu

    cpu.enable(force=True, scripts=scripts)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    model_parallel_cuda_manual_seed(1)
    return parallel_state


def _result(path: Path, exitcode: int | None) -> Any:
    assert path.exists(), f"{path.name} was never written; the process ended with exit code {exitcode}"
    return pickle.loads(path.read_bytes())


def run(rank: int, world: int, folder: str, seconds: float, some_are_lost: bool, script: str | None) -> None:
    """Be one rank, in a process of its own; ``script`` is where its function is, where that is a script's own."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        if script:
            multiprocessing.spawn._fixup_main_from_path(script)  # type: ignore[attr-defined]
        fn, args = pickle.loads(Path(folder, "call").read_bytes())
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
