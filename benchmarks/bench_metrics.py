"""What metrics cost: time in sampling and logging as a share of training time, in one run.

run as:  python benchmarks/bench_metrics.py            (a LLaMA of 3M parameters, TP2 over gloo, 300 steps)

The metrics' own functions are timed where they are called, so the share is not a difference of two noisy runs. On a
CPU every operation is finished when its call returns, so this is the whole cost. A line is logged every ten steps,
which is ten times as often as Megatron does by default. Writes CSV and JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flashcomm_megatron as fc
from flashcomm_megatron import cpu
from flashcomm_megatron.observe import error_sampling as sampling

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

WORLD = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--interval", type=int, default=10, help="steps between two lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (folder, options), nprocs=WORLD)
        row = torch.load(Path(folder) / "row.pt", weights_only=True)
    print("\n".join(f"{name:>16}  {value}" for name, value in row.items()))
    record.save("metrics", [row])


def train(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One rank's part; the last rank, which writes the file, leaves the row in ``folder``."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORLD))
    cpu.enable(force=True)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    step = prepare()
    fc.enable(bits=4, metrics=f"{folder}/run.jsonl", log_interval=options.interval)
    spent = {"sampling": 0.0, "logging": 0.0}
    sampling.sample = timed(sampling.sample, spent, "sampling")
    log = timed(fc.log_metrics, spent, "logging")
    log(0)  # the settings are looked up once a run
    spent["logging"] = 0.0
    started = time.perf_counter()
    for number in range(1, options.steps + 1):
        log(number, {"loss": step()})
    total = time.perf_counter() - started
    if rank == WORLD - 1:
        torch.save(result(options, spent, total), Path(folder) / "row.pt")
    dist.barrier()
    dist.destroy_process_group()


def prepare() -> Callable[[], torch.Tensor]:
    """A training step of the tiny LLaMA of examples/train_tiny.py on random tokens."""
    from hf_llama import build
    from megatron.core import parallel_state, tensor_parallel
    from train_tiny import SHAPE, next_token_loss

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=WORLD)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = build(SHAPE, WORLD, torch.float32, init_std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(1)

    def step() -> torch.Tensor:
        loss = next_token_loss(model, torch.randint(SHAPE.vocab, (4, SHAPE.context + 1), generator=draw))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step()
    return step


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """``function``, whose seconds are added to ``spent[name]``."""

    def call(*args: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent[name] += time.perf_counter() - started

    return call


def result(options: argparse.Namespace, spent: dict[str, float], total: float) -> dict[str, Any]:
    calls = fc.stats()["quantized"]
    return {
        "steps": options.steps,
        "interval": options.interval,
        "step_ms": round(1e3 * total / options.steps, 3),
        "quantized_calls": calls,
        "sampling_us_per_call": round(1e6 * spent["sampling"] / calls, 2),
        "logging_ms_per_line": round(1e3 * spent["logging"] / (options.steps // options.interval), 3),
        "sampling_percent": round(100 * spent["sampling"] / total, 4),
        "logging_percent": round(100 * spent["logging"] / total, 4),
        "metrics_percent": round(100 * (spent["sampling"] + spent["logging"]) / total, 4),
    }


if __name__ == "__main__":
    main()
