"""Time and bytes of a training step, compressed against exact, taking turns in one run.

run as:  python benchmarks/bench_training.py               (TP2 over gloo on this machine, TP and sequence parallelism)
         torchrun ... benchmarks/bench_training.py         (the same between machines or network namespaces)

A GPT with Megatron's mixed-precision optimizer (training_loop.py) exists twice, once trained exactly and once
compressed. They take turns of a few steps; times are the slowest rank's, medians over the turns. Bytes are of one step:
of the linear layers, which are compressed, and of everything that the tensor-parallel group sends, with the embedding,
the output layer, the loss and the norms' gradients, which are not. Writes CSV and JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training_loop import Shape, Training, join

import flashcomm_megatron as fc
from flashcomm_megatron.collectives.plan import exact_bytes

WORLD = 2


def main() -> None:
    options = parse()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rows = measure(options)
        if dist.get_rank() == 0:
            finish(rows, options)
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(one_of_two, (folder, options), nprocs=WORLD)
            finish(torch.load(Path(folder) / "rows.pt", weights_only=True), options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--grad-bits", type=int, default=8)
    for name, value in {"layers": 8, "hidden": 256, "ffn": 1024, "heads": 8, "context": 256, "batch": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument("--name", default="training", help="of the files in results/; empty: write none")
    return parser.parse_args()


def one_of_two(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One rank's part; rank 0 leaves the rows in ``folder``."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORLD))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    rows = measure(options)
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for tensor parallelism and one for sequence parallelism."""
    warnings.filterwarnings("ignore")
    join(tensor=dist.get_world_size())
    return [compare(options, sequence_parallel) for sequence_parallel in (False, True)]


def compare(options: argparse.Namespace, sequence_parallel: bool) -> dict[str, Any]:
    """Both trainings counted for one step, then timed in turns."""
    shape = Shape(options.layers, options.hidden, options.ffn, options.heads, 1024, options.context, options.batch)
    config = fc.Config(bits=options.bits, grad_bits=options.grad_bits)
    text = torch.randint(shape.vocab, (100_000,), generator=torch.Generator().manual_seed(1))
    exact, quantized = (Training(shape, 1, 10_000, sequence_parallel=sequence_parallel) for _ in range(2))
    with metered() as sent:
        exact.step(text)
    fc.reset_stats()
    with fc.flashcomm(config):
        quantized.step(text)
    counted = fc.stats()
    times: dict[str, list[float]] = {"exact": [], "quantized": []}
    for _ in range(options.turns):
        times["exact"].append(timed(exact, text, options.steps, None))
        times["quantized"].append(timed(quantized, text, options.steps, config))
    seconds = {name: statistics.median(each) for name, each in times.items()}
    return {
        "parallelism": "SP" if sequence_parallel else "TP",
        "world": dist.get_world_size(),
        "bits": options.bits,
        "grad_bits": options.grad_bits,
        **{name: getattr(options, name) for name in ("layers", "hidden", "context", "batch")},
        "exact_ms": round(1e3 * seconds["exact"], 2),
        "quantized_ms": round(1e3 * seconds["quantized"], 2),
        "speedup": round(seconds["exact"] / seconds["quantized"], 3),
        "layers_exact_bytes": counted["exact_bytes"],
        "layers_wire_bytes": counted["wire_bytes"],
        "layers_percent": round(100 * counted["wire_bytes"] / counted["exact_bytes"], 1),
        "all_exact_bytes": sum(sent),
        "all_percent": round(100 * (1 - (counted["exact_bytes"] - counted["wire_bytes"]) / sum(sent)), 1),
    }


def timed(training: Training, text: torch.Tensor, steps: int, config: fc.Config | None) -> float:
    """Seconds of a step on the slowest rank, compressed with a configuration; one more step goes before."""
    with fc.flashcomm(config) if config else nullcontext():
        training.step(text)
        dist.barrier()
        started = time.perf_counter()
        for _ in range(steps):
            training.step(text)
        seconds = torch.tensor((time.perf_counter() - started) / steps)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


@contextmanager
def metered() -> Iterator[list[int]]:
    """The bytes that this rank sends, by the ring's count, in each collective of the tensor-parallel group.

    Noted where Megatron has bound torch.distributed's functions, so only while flash-comm is off.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers, mappings

    group, sent = parallel_state.get_tensor_model_parallel_group(), []

    def noting(original: Callable[..., Any], collective: str, position: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("group") is group:
                sent.append(exact_bytes(collective, args[position].nbytes, group.size()))
            return original(*args, **kwargs)

        return run

    rows = [(torch.distributed, "all_reduce", "all_reduce", 0)]
    for module in (layers, mappings):
        rows += [
            (module, "dist_all_gather_func", "all_gather", 1),
            (module, "dist_reduce_scatter_func", "reduce_scatter", 1),
        ]
    with ExitStack() as stack:
        for owner, name, collective, position in rows:
            stack.enter_context(mock.patch.object(owner, name, noting(getattr(owner, name), collective, position)))
        yield sent


def finish(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Show the rows and keep them."""
    for row in rows:
        print("\n".join(f"{name:>20}  {value}" for name, value in row.items()), end="\n\n")
    if options.name:
        record.save(options.name, rows)


if __name__ == "__main__":
    main()
