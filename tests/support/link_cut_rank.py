"""One rank on a machine of its own for test_link_cut.py: calls all the time while somebody plays with the cable.

link_cut_rank.py RANK FOLDER     prints the error that ended it; FOLDER holds the store and the signs "ready", "go on"
"""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from flashcomm_megatron import collectives
from flashcomm_megatron.config import Config

VALUES = 200_000


def main(rank: int, folder: Path) -> None:
    """Calls that must be right until "go on", then calls until one fails."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    call(Config(bits=4, min_bytes=0))
    (folder / f"ready-{rank}").touch()
    done = 0
    while done < 10 or not everyone_sees(folder / "go on"):
        call(Config(bits=4, min_bytes=0))
        done += 1
    (folder / f"calls-{rank}").write_text(str(done))
    call(impatient := Config(bits=4, min_bytes=0, timeout=3.0))
    (folder / f"fragile-{rank}").touch()
    started = time.monotonic()
    try:
        while time.monotonic() - started < 60:
            started = time.monotonic()
            call(impatient)
    except RuntimeError as error:
        (folder / f"error-{rank}").write_text(f"{time.monotonic() - started:.2f} s: {error}")


def everyone_sees(sign: Path) -> bool:
    """The same on both ranks, or they would part."""
    seen = torch.tensor([int(sign.exists())])
    dist.all_reduce(seen, op=dist.ReduceOp.MIN)
    return bool(seen)


def call(config: Config) -> None:
    """One all-reduce, checked."""
    found = collectives.all_reduce(torch.ones(VALUES), None, config)
    assert torch.equal(found, torch.full((VALUES,), 2.0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
