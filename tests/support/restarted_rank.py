"""One rank of a job that torchrun restarts: it sums, and the attempt's victim ends in one of the ways of ``ENDS``.

Run by tests/stress/restarts.py, which gives a folder, the transport, and how many restarts there will be. Every attempt
adds lines of JSON to ``attempts-RANK.jsonl``, and to ``metrics.jsonl`` as a training run would.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import flashcomm_megatron as fc
from flashcomm_megatron.collectives import all_reduce

CALLS = 4  # of an attempt; its victim ends before, in or behind one of them


def killed() -> None:
    """As by the kernel when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def exits() -> None:
    """As a script that gives up."""
    sys.exit(3)


def raises() -> None:
    """As a script with an error."""
    raise RuntimeError("this rank was told to fail")


def exits_at_once() -> None:
    """Without leaving anything in order."""
    os._exit(4)


ENDS: tuple[Callable[[], None], ...] = (killed, exits, raises, exits_at_once)


def summed(rank: int, world: int, seed: int, config: fc.Config, end: Callable[[], None] | None) -> bool:
    """Whether one sum of stairs, which every width carries, is exact; the victim ends while it is under way."""
    parts = [(torch.randint(-9, 9, (64,), generator=torch.Generator().manual_seed(seed * 8 + r))) for r in range(world)]
    x = parts[rank].float().repeat_interleave(4096)
    handle = all_reduce(x, None, config, async_op=True)
    if end is not None:
        end()
    return torch.equal(handle.wait(), torch.stack(parts).sum(0).float().repeat_interleave(4096))


def start_wandb(folder: Path) -> Any:
    """A run of W&B, offline, as Megatron's last rank has it; None without the package."""
    try:
        import wandb
    except ImportError:
        return None
    return wandb.init(mode="offline", dir=folder, project="restarts", settings=wandb.Settings(silent=True))


def main(folder: Path, transport: str, restarts: int) -> None:
    """One attempt."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    note = (folder / f"attempts-{rank}.jsonl").open("a", buffering=1)
    print(json.dumps({"attempt": attempt, "started": time.time()}), file=note)
    is_last = attempt == restarts
    end = None if is_last or rank != attempt % world else ENDS[attempt // world % len(ENDS)]
    where = attempt // 3 % (CALLS + 1)  # in call number ..., and CALLS: before the process group exists
    if end is not None and where == CALLS:
        end()
    dist.init_process_group("gloo")
    logged = start_wandb(folder) if rank == world - 1 else None
    config = fc.Config(bits=4, transport=transport, min_bytes=0, metrics=str(folder / "metrics.jsonl"))  # type: ignore
    fc.enable(config)
    right = True
    for call in range(CALLS):
        fc.log_metrics(attempt * CALLS + call)
        during = end if call == where else None
        try:
            right &= summed(rank, world, attempt * CALLS + call, config, during)
        finally:
            print(json.dumps({"attempt": attempt, "call": call, "right": right, "at": time.time()}), file=note)
    if not is_last:
        all_reduce(torch.ones(100_000), None, config)  # a survivor hears of its victim here at the latest
    if logged is not None:
        logged.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
