"""Compression on slow wires that any Linux machine has: ranks in network namespaces, joined at a given rate.

run as root:  python benchmarks/link_lab.py              (all rates; collectives, and a GPT at TP2 and TP4; ~15 minutes)
              python benchmarks/link_lab.py --quick      (1 Gbit/s, 8 MiB all-reduce at TP2; writes nothing)
              python benchmarks/link_lab.py --hosts 2 --per-host 2 --rates 100mbit    (several ranks on each machine)

Each rank is on a machine of its own unless --per-host says otherwise. Times are medians of the slowest rank's, stock
and compressed in turns, with default flags. A kernel without netem cannot add delay: latency is that of a veth pair.
Writes CSV, JSON and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
from link_hosts import Hosts, Refused, bits_per_second

KIB = 1024
RATES = ["100mbit", "1gbit", "10gbit", "25gbit", "loopback"]
SIZES = [1 * KIB, 16 * KIB, 256 * KIB, 1024 * KIB, 8192 * KIB, 65536 * KIB]
LONGEST = 3.0  # seconds of an exact all-reduce; larger tensors are left out at slow rates
ROOT = Path(__file__).parent.parent


def main() -> None:
    options = parse()
    rows: list[dict[str, Any]] = []
    try:
        for rate in options.rates:
            for hosts in options.hosts:
                rows += measure(rate, hosts, options)
                show(rows)
    except Refused as error:
        sys.exit(f"link_lab: {error}")
    finally:  # what was measured is kept if the rest is cut off
        if rows and not options.quick:
            record.save(options.name, rows)
            plot(rows, options.name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=RATES, help="as tc writes them, or loopback: one machine for all")
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--per-host", type=int, default=1, help="ranks on each machine")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="bytes of the full tensor")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--seconds", type=float, default=1.5, help="of measuring for each row")
    parser.add_argument(
        "--traffic", type=int, nargs="*", default=[], help="sizes whose bytes the interface is to count"
    )
    parser.add_argument("--no-model", dest="model", action="store_false", help="collectives only")
    parser.add_argument("--name", default="link_lab", help="of the files under benchmarks/results")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.rates, options.hosts, options.sizes, options.widths, options.model = (
            ["1gbit"],
            [2],
            [8 << 20],
            [4],
            False,
        )
    return options


def measure(rate: str, hosts: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one network."""
    together = rate == "loopback"
    world = hosts * options.per_host
    sizes = options.sizes if together else [size for size in options.sizes if seconds(size, rate) <= LONGEST]
    with tempfile.TemporaryDirectory() as folder, Hosts(1 if together else hosts, None if together else rate) as lab:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(Path(__file__).parent / "link_ranks.py"), "--out", str(out)]
        command += ["--sizes", *map(str, sizes), "--widths", *map(str, options.widths)]
        command += ["--traffic", *map(str, [] if together else options.traffic)]
        command += ["--seconds", str(options.seconds), *(["--model"] if options.model else [])]
        processes = []
        for rank in range(world):
            environment = {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % options.per_host),
                "MASTER_ADDR": lab.address(0), "MASTER_PORT": "29555", "GLOO_SOCKET_IFNAME": "eth0",
                "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            }  # fmt: skip
            processes.append(lab.start(0 if together else rank // options.per_host, command, environment))
        try:
            failed = [rank for rank, process in enumerate(processes) if process.wait()]
        finally:
            for process in processes:
                process.kill()
        if failed:
            sys.exit(f"link_lab: ranks {failed} failed; their own errors stand above.")
        rows: list[dict[str, Any]] = json.loads(out.read_text())
    return [{"rate": rate, "world": world, "per_host": world if together else options.per_host, **row} for row in rows]


def seconds(nbytes: int, rate: str) -> float:
    """Of an exact all-reduce over two machines."""
    return nbytes * 8 / bits_per_second(rate)


COLUMNS = ["rate", "world", "what", "bytes", "bits", "compression", "exact_ms", "quantized_ms", "speedup", "noise"]


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    print("  ".join(f"{name:>14}" for name in COLUMNS))
    for row in rows:
        cells = (row.get(name, "") for name in COLUMNS)
        print("  ".join(f"{cell:14.3f}" if isinstance(cell, float) else f"{cell:>14}" for cell in cells), flush=True)


def plot(rows: list[dict[str, Any]], name: str) -> None:
    """Speed-up of the all-reduce against size for every rate, and of the model's work against rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = list(dict.fromkeys(row["rate"] for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for rate in rates:
        wanted = {"rate": rate, "what": "all_reduce", "bits": 4, "world": 2}
        chosen = [row for row in rows if wanted.items() <= row.items()]
        left.plot([row["bytes"] for row in chosen], [row["speedup"] for row in chosen], marker="o", label=rate)
    left.set(xscale="log", title="all_reduce, 2 ranks, 4 bits", xlabel="bytes of the tensor", ylabel="speed-up")
    works = [(what, world) for what in ("first token", "training step") for world in (2, 4)]
    for what, world in works:
        chosen = [row for row in rows if row["what"] == what and row["world"] == world]
        right.plot(
            [row["rate"] for row in chosen], [row["speedup"] for row in chosen], marker="o", label=f"{what}, TP{world}"
        )
    right.set(title="Megatron-Core GPT, 4 bits", xlabel="rate of the link", ylabel="speed-up over stock Megatron")
    for axis in (left, right):
        axis.axhline(1, color="black", linewidth=0.8)
        axis.legend()
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
