"""Two checkouts beside each other, in one run: codec, sums through shared memory, sums over gloo.

run:  python benchmarks/before_after.py --before DIR      DIR: another checkout, its extension built in place

Both take turns, a process each for every measurement, so that what disturbs one disturbs the other. Only what both
offer is called. Numbers are medians over the turns; a ratio above 1 says that this checkout is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, os, sys, time, torch, torch.distributed as dist
import flashcomm_megatron as fc
torch.set_num_threads(1)

def best(call, seconds=0.4):
    call(); call()
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 5:
        start = time.perf_counter(); call(); found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 4]

def codec():
    for recipe in ("auto", "flash-v1"):
        for values in (1 << 16, 1 << 23):
            config, x = fc.Config(bits=4, recipe=recipe), torch.randn(values // 4096, 4096).bfloat16()
            payload = fc.encode(x, config)
            size, shape = f"{values >> 10} Ki values", (x.shape, x.dtype)
            yield f"{recipe} encode {size}", best(lambda: fc.encode(x, config))
            yield f"{recipe} decode {size}", best(lambda: fc.decode(payload, *shape, config))

def sums(transport):
    dist.init_process_group("gloo")
    for kib in (2, 64, 8192):
        x = torch.randn(max(kib // 8, 1), min(kib, 8) * 512).bfloat16()
        config = fc.Config(bits=4, min_bytes=0, transport=transport)
        def call():
            dist.barrier()
            start = time.perf_counter()
            fc.all_reduce(x.clone(), None, config)
            return time.perf_counter() - start
        found = sorted(call() for _ in range(10 if kib > 1000 else 60))
        way = {"auto": "shared memory", "group": "gloo"}[transport]
        yield f"{way}, {dist.get_world_size()} ranks, {kib} KiB", found[len(found) // 4]
    dist.barrier()
    dist.destroy_process_group()

rows = dict(codec() if sys.argv[1] == "codec" else sums(sys.argv[1]))
if os.environ.get("RANK", "0") == "0":
    print("ROWS" + json.dumps(rows))
"""
CASES = (("codec", 1), ("auto", 2), ("auto", 4), ("group", 2), ("group", 4))


def measured(checkout: Path, what: str, ranks: int, port: int) -> dict[str, float]:
    """Seconds by name, of one process or of ``ranks`` of them."""
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "RANK": str(rank),
            "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, "-c", SCRIPT, what]
        processes.append(subprocess.Popen(command, cwd="/", env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"before_after: {checkout}: {what} at {ranks} ranks failed; its error stands above.")
    rows: dict[str, float] = json.loads(outputs[0].partition("ROWS")[2])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    import record

    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"before": [], "after": []})
    for turn in range(options.turns):
        for number, (what, ranks) in enumerate(CASES):
            for name, checkout in (("before", options.before.resolve()), ("after", ROOT)):
                port = 29600 + 20 * turn + 2 * number + (name == "after")
                for row, seconds in measured(checkout, what, ranks, port).items():
                    found[row][name].append(seconds)
    rows: list[dict[str, Any]] = []
    for row, times in found.items():
        before, after = (1e6 * statistics.median(times[name]) for name in ("before", "after"))
        ratios = [a / b for a, b in zip(times["before"], times["after"], strict=True)]
        rows.append({"what": row, "before_us": before, "after_us": after, "ratio": statistics.median(ratios)})
        print(f"{row:40} {before:12.1f} us {after:12.1f} us  {rows[-1]['ratio']:6.2f}x", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=options.before, capture_output=True, text=True)
    record.save("before_after", [{"before": commit.stdout.strip(), **row} for row in rows])


if __name__ == "__main__":
    main()
