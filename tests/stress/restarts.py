"""Elastic restarts: torchrun starts all ranks anew whenever one ends, and none of them is left behind or waits.

    python tests/stress/restarts.py [--restarts 50] [--ranks 2] [--out benchmarks/results/restarts.json]

A rank is killed, exits or fails before, in and between calls, in turns (tests/support/restarted_rank.py). Every attempt
must sum right, all must end in time, and /dev/shm must be as it was.

torchrun keeps one store for all attempts, so ranks of a new attempt may read where those of the last one listened, and
wait for them in ``init_process_group`` (pytorch/pytorch#135712; with torch 2.13 one restart in three here, without this
package as well). ``FRESH_STORE`` makes torchrun give every attempt a store of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

from patience import patient  # noqa: E402
from record import circumstances  # noqa: E402

TRANSPORTS = ("shared-memory", "group")
RANK = ROOT / "tests" / "support" / "restarted_rank.py"
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def left_behind() -> list[str]:
    """What processes that have ended left in /dev/shm: names are flash-comm-PROCESS-RANDOM."""
    ours = [name for name in os.listdir("/dev/shm") if name.startswith("flash-comm-")]
    return [name for name in ours if not Path("/proc", name.split("-")[2]).exists()]


def run(restarts: int, transport: str, ranks: int, seconds: float) -> dict[str, Any]:
    """Restart a job ``restarts`` times; seconds between its attempts' starts. AssertionError where it went wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1"]
        command += ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        command += [str(RANK), name, transport, str(restarts)]
        environment = os.environ | FRESH_STORE | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (folder / "log").open("w") as log:  # no pipe: what a killed rank started may hold it open
            ended = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=patient(seconds))
        log_text = (folder / "log").read_text()
        assert ended.returncode == 0, log_text[-8000:]
        lines = [json.loads(line) for line in (folder / "attempts-0.jsonl").read_text().splitlines()]
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    starts = [line["started"] for line in lines if "started" in line]
    assert len(starts) == restarts + 1, f"{len(starts)} attempts"
    assert all(line["right"] for line in lines if "right" in line), "a sum is wrong"
    assert not left_behind()
    steps = [line["step"] for line in logged if "step" in line]
    return {"apart": [round(b - a, 1) for a, b in pairwise(starts)], "steps": steps}


def main(words: list[str]) -> int:
    """The command line of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(words)
    found = {each: run(asked.restarts, each, asked.ranks, seconds=3600.0)["apart"] for each in TRANSPORTS}
    rows = [{"transport": each, "restarts": len(apart), "seconds apart": apart} for each, apart in found.items()]
    text = json.dumps({"circumstances": circumstances(), "ranks": asked.ranks, "rows": rows}) + "\n"
    print(text)
    if asked.out:
        asked.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
