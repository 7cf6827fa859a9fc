"""torch's symmetric-memory all-reduce beside ours, two processes on one GPU, which take turns on it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
SIZES = (16 * 2**10, 2**20, 16 * 2**20)
CALLS = 20


def rows() -> Iterator[dict[str, Any]]:
    """One row for each size: milliseconds a call, torch's and ours at 4 bits."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    from ranks import spawn

    yield from spawn(_rank, 2, seconds=60)[0]


def _rank(rank: int, world: int) -> list[dict[str, Any]]:
    import torch.distributed._symmetric_memory as symm_mem

    from flashcomm_megatron.collectives import all_reduce
    from flashcomm_megatron.config import Config

    torch.cuda.set_device(0)
    group, found = dist.group.WORLD, []
    config = Config(bits=4, recipe="flash-v1", block=32, min_bytes=0, transport="peer")
    for size in SIZES:
        x = symm_mem.empty(size // 2, dtype=torch.bfloat16, device="cuda")
        symm_mem.rendezvous(x, group.group_name)
        x.fill_(rank + 1)
        one = _milliseconds(lambda x=x: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", group.group_name))
        two = _milliseconds(lambda x=x: torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", group.group_name))
        y = torch.randn(size // 2, device="cuda").bfloat16()
        ours = _milliseconds(lambda y=y: all_reduce(y, group, config))
        found.append({"KiB": size // 1024, "one-shot ms": one, "two-shot ms": two, "ours 4 bits ms": ours})
    return found


def _milliseconds(run: Any) -> float:
    run()
    torch.cuda.synchronize()
    dist.barrier()
    started = time.monotonic()
    for _ in range(CALLS):
        run()
    torch.cuda.synchronize()
    return round((time.monotonic() - started) / CALLS * 1e3, 3)
