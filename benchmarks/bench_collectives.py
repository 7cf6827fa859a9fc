"""Quantized collectives over gloo on this machine, against torch.distributed's of the same dtype.

run as:  python benchmarks/bench_collectives.py            (worlds 2 and 4, sizes 4 KiB to 8 MiB, widths 8 and 4)
         python benchmarks/bench_collectives.py --quick    (world 2, 8 MiB, 4 bits)

Every result is compared with the exact sum and between the ranks before it is timed. Times are the slowest rank's,
medians over repetitions in which the exact and the quantized call take turns. Writes CSV, JSON and a plot.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flashcomm_megatron as fc

KIB = 1024
SIZES = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB, 8192 * KIB]  # bytes of the full tensor
WIDTHS = [8, 4]


def main() -> None:
    options = parse()
    rows: list[dict[str, Any]] = []
    for world in options.worlds:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (world, folder, options), nprocs=world)
            rows += torch.load(Path(folder) / "rows.pt", weights_only=True)
    show(rows)
    if not options.quick:
        record.save("collectives", rows)
        plot(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", help="bytes of the full tensor")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--recipes", nargs="+", default=["auto", "flash-v1"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="one size, one width, world 2; writes nothing")
    options = parser.parse_args()
    options.worlds = options.worlds or ([2] if options.quick else [2, 4])
    options.sizes = options.sizes or ([8192 * KIB] if options.quick else SIZES)
    options.widths = options.widths or ([4] if options.quick else WIDTHS)
    return options


def measure(rank: int, world: int, folder: str, options: argparse.Namespace) -> None:
    """One rank's part; rank 0 leaves the rows in ``folder``."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch renames gather and scatter from time to time
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    rows = []
    for nbytes in options.sizes:
        for bits, recipe in itertools.product(options.widths, options.recipes):
            config = fc.Config(bits=bits, recipe=recipe, min_bytes=0)
            for name in ("all_reduce", "reduce_scatter", "all_gather"):
                rows.append(compare(name, nbytes, config, options))
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")
    dist.barrier()
    dist.destroy_process_group()


def compare(name: str, nbytes: int, config: fc.Config, options: argparse.Namespace) -> dict[str, Any]:
    """One row: both implementations checked against each other, then timed in turns."""
    world, dtype = dist.get_world_size(), getattr(torch, options.dtype)
    x = values(name, nbytes // dtype.itemsize, dtype)
    calls = implementations(name, x, config)
    fc.reset_stats()
    error = relative_error(calls.quantized(), calls.exact())
    counted = fc.stats()
    assert counted["quantized"] == 1 and error < 2.0 ** (2 - config.bits), f"{name} {config.bits} bits: error {error}"
    times = {"exact": [], "quantized": []}
    for _ in range(options.repeats if nbytes <= 2**20 else options.repeats // 2):
        calls.restore()
        times["exact"].append(timed(calls.exact))
        times["quantized"].append(timed(calls.quantized))
    slowest = {key: statistics.median(slowest_rank(each)) for key, each in times.items()}
    return {
        "collective": name,
        "world": world,
        "bytes": nbytes,
        "bits": config.bits,
        "recipe": config.recipe,
        "dtype": options.dtype,
        "exact_ms": round(slowest["exact"] * 1e3, 4),
        "quantized_ms": round(slowest["quantized"] * 1e3, 4),
        "speedup": round(slowest["exact"] / slowest["quantized"], 3),
        "byte_ratio": round(counted["exact_bytes"] / counted["wire_bytes"], 3),
        "rel_error": round(error, 5),
    }


def values(name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """This rank's input; for all_gather its share, so that ``numel`` always counts the full tensor."""
    share = numel // dist.get_world_size() if name == "all_gather" else numel
    return torch.randn(share, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)


class Implementations(NamedTuple):
    """One collective on both sides; each writes into buffers allocated once."""

    exact: Callable[[], torch.Tensor]
    quantized: Callable[[], torch.Tensor]
    restore: Callable[[], object]  # before a call: a sum in place of a sum overflows after a hundred calls


def implementations(name: str, x: torch.Tensor, config: fc.Config) -> Implementations:
    """torch.distributed's and ours."""
    world = dist.get_world_size()
    if name == "all_reduce":
        sums = x.clone(), x.clone()

        def exact() -> torch.Tensor:
            dist.all_reduce(sums[0])
            return sums[0]

        return Implementations(
            exact, lambda: fc.all_reduce(sums[1], None, config), lambda: [each.copy_(x) for each in sums]
        )
    size = x.numel() // world if name == "reduce_scatter" else x.numel() * world
    outs = x.new_empty(size), x.new_empty(size)
    plain = dist.reduce_scatter_tensor if name == "reduce_scatter" else dist.all_gather_into_tensor
    ours = getattr(fc, name)

    def exact() -> torch.Tensor:
        plain(outs[0], x)
        return outs[0]

    return Implementations(exact, lambda: ours(x, None, config, out=outs[1]), lambda: None)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS error over RMS value."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def timed(call: Callable[[], torch.Tensor]) -> float:
    """Seconds of one call that all ranks begin together."""
    dist.barrier()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def slowest_rank(seconds: list[float]) -> list[float]:
    """Elementwise maximum over the ranks."""
    times = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.tolist()


def show(rows: list[dict[str, Any]]) -> None:
    print(
        "| collective | world | recipe | KiB | bits | exact ms | quantized ms | speed-up | bytes ratio | rel. error |"
    )
    print("|---|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['collective']} | {row['world']} | {row['recipe']} | {row['bytes'] // KIB} "
            f"| {row['bits']} | {row['exact_ms']:.3f} "
            f"| {row['quantized_ms']:.3f} | {row['speedup']:.2f} | {row['byte_ratio']:.2f} | {row['rel_error']:.4f} |"
        )


def plot(rows: list[dict[str, Any]]) -> None:
    """Speed-up against size, a panel for each collective and world, a line for each recipe and width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    worlds = sorted({row["world"] for row in rows})
    names = ["all_reduce", "reduce_scatter", "all_gather"]
    figure, axes = plt.subplots(len(worlds), 3, figsize=(12, 3.2 * len(worlds)), sharex=True, squeeze=False)
    for line, world in enumerate(worlds):
        for column, name in enumerate(names):
            axis = axes[line][column]
            for bits, recipe in dict.fromkeys((row["bits"], row["recipe"]) for row in rows):
                wanted = {"collective": name, "world": world, "bits": bits, "recipe": recipe}
                chosen = [row for row in rows if wanted.items() <= row.items()]
                axis.plot(
                    [r["bytes"] for r in chosen],
                    [r["speedup"] for r in chosen],
                    marker="o",
                    label=f"{recipe}, {bits} bits",
                )
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(xscale="log", title=f"{name}, {world} ranks", xlabel="bytes of the tensor", ylabel="speed-up")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(record.RESULTS / "collectives.png", dpi=120)


if __name__ == "__main__":
    main()
