"""Two processes over NCCL, for gpu_check.py: sums and halves over the process group, the default path on GPUs.

On one GPU NCCL refuses a second rank, unless each has a host name of its own and they meet over sockets, or it is told
to allow it; both are tried. Every result is compared with the specification, in the parent's row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
WORLD, SECONDS = 2, 45
WAYS = {
    "own host names, sockets": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
    "several ranks on a GPU": {"NCCL_MULTI_RANK_GPU_ENABLE": "1"},
}


def main() -> int:
    """0 if one way worked."""
    gpus, worked = torch.cuda.device_count(), False
    for name, settings in ({"a GPU each": {}} if gpus >= WORLD else WAYS).items():
        said = one_way(settings, own_hosts="host" in name)
        worked |= said == "right"
        row = {"section": "nccl", "way": name, "found": said}
        print(row)
        with open(os.environ.get("FLASHCOMM_CHECK_ROWS", os.devnull), "a") as rows:
            rows.write(json.dumps(row) + "\n")
        if worked:
            break
    return 0 if worked else 1


def one_way(settings: dict[str, str], own_hosts: bool) -> str:
    """ "right", or the end of what a rank said."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(WORLD):
            own = {"NCCL_HOSTID": f"rank{rank}"} if own_hosts else {}
            command = [sys.executable, __file__, str(rank), f"{folder}/store"]
            ranks.append(
                subprocess.Popen(
                    command, env={**os.environ, **settings, **own}, text=True, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        try:
            said = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
        except subprocess.TimeoutExpired:
            return f"no answer within {SECONDS} s"
        finally:
            for rank in ranks:
                rank.kill()
    failed = [text for rank, text in zip(ranks, said, strict=True) if rank.returncode]
    return failed[0][-500:] if failed else "right"


def on_rank(rank: int, store: str) -> None:
    """A Megatron-like sum, its halves, eager and captured, against the specification."""
    from specification import expected, planned, same, strange

    from flashcomm_megatron.collectives import all_gather, all_reduce, prepare, reduce_scatter
    from flashcomm_megatron.config import Config

    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for algorithm in ("one-step", "two-step"):
        config = Config(bits=4, min_bytes=0, transport="group", algorithm=algorithm)
        prepare(None, config)
        parts = [strange(8 * 2048, torch.bfloat16, each).view(8, 2048) for each in range(WORLD)]
        x = parts[rank].cuda()
        made = planned("all_reduce", x, WORLD, config)
        legs = made.reduce, made.gather
        check(same(all_reduce(x.clone(), None, config).view(-1), expected(algorithm, legs, parts)[rank]), algorithm)
        check(same(all_gather(x, None, config).view(-1), expected("all_gather", legs, parts)[rank]), "all_gather")
        found = reduce_scatter(x, None, config)
        check(same(found.view(-1), expected("reduce_scatter", legs, parts)[rank]), "reduce_scatter")
    dist.destroy_process_group()


def check(holds: bool, what: str) -> Any:
    if not holds:
        raise AssertionError(f"{what}: wrong bits")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        on_rank(int(sys.argv[1]), sys.argv[2])
    else:
        sys.exit(main())
