"""Measures what a compressed all-reduce over a GPU's process group costs the host: benchmarks/results/host_time.json.

No GPU and no peer: torch's `fake` process group does nothing, the codec's native calls return at once, and tensors are
tiny ones in main memory that take the way of those on GPUs (comm/process_group.py). What is left is Python and torch's
dispatch: everything before the launches. Gradients are off, as inside a layer's autograd function. Beside it, in the
same run: the same over a backend whose collectives return at once; the two collectives alone, of the same lengths,
again and again with warm caches (torch's fake gather copies every part); torch.distributed's all_reduce of the tensor.

    python benchmarks/bench_host.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import record
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (it adds the backend)

from flashcomm_megatron import collectives
from flashcomm_megatron.codec import native
from flashcomm_megatron.comm.communicator import Communicator
from flashcomm_megatron.comm.process_group import ProcessGroup
from flashcomm_megatron.config import Config

BAR = 60.0  # microseconds of the processor at every number of ranks
CALLS, ROUNDS = 100, 80


def on_fake_ranks(world: int, codec: Any) -> Callable[[], Any]:
    """A compressed all-reduce among ``world`` ranks of which only this one exists, ready to be called again."""
    dist.init_process_group("fake", rank=0, world_size=world, store=dist.HashStore())
    ProcessGroup.messages = ()
    native._extension = codec
    config, comm = Config(bits=4, min_bytes=0, transport="group"), Communicator.of(dist.group.WORLD)
    comm.agreed.append(config)
    comm._nodes = (0,) * world
    x = torch.ones(8 * world, 64, dtype=torch.bfloat16)
    return lambda: collectives.all_reduce(x, None, config)


def idle_codec() -> Any:
    """The extension with calls that do nothing."""
    calls = {name: lambda *_: None for name in ("encode_slices", "decode_slices", "reduce_slices")}
    return SimpleNamespace(**calls, info=lambda: {})


def exchanges_alone() -> Callable[[], None]:
    """The exchanges of the plan that was made last, with nothing around them."""
    comm = Communicator.of(dist.group.WORLD)
    (plan,) = comm.plans.values()
    call, (piece,) = plan.call(), plan.pieces
    boxes = comm.buffers.take(piece.lengths, torch.device("cpu"))

    def both() -> None:
        if plan.algorithm == "two-step":
            plan.transport.exchange(boxes.outbox, piece.sizes, boxes.inbox, piece.incoming, call).wait()
        plan.transport.gather(boxes.gathered, boxes.own, call).wait()

    return both


def without_exchanges(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` over a backend that does nothing at all."""
    arrived = SimpleNamespace(wait=lambda: None)
    nothing = {"cpu": SimpleNamespace(alltoall_base=lambda *_: arrived, _allgather_base=lambda *_: arrived)}
    ends = Communicator.of(dist.group.WORLD)._over_group

    def alone() -> None:
        ends._backends, backends = nothing, ends._backends
        call()
        ends._backends = backends

    return alone


def microseconds(*calls: Callable[[], Any]) -> list[float]:
    """Processor time of one of each, the least of rounds taken in turn: what else runs only adds to it."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for times, call in zip(found, calls, strict=True):
            started = time.process_time()
            for _ in range(CALLS):
                call()
            times.append((time.process_time() - started) / CALLS * 1e6)
    return [min(times) for times in found]


def measure(world: int) -> dict[str, Any]:
    """One row."""
    ours, x = on_fake_ranks(world, idle_codec()), torch.ones(8 * world, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        ours()
        bare = exchanges_alone(), lambda: dist.all_reduce(x)
        compressed, own, alone, exact = microseconds(ours, without_exchanges(ours), *bare)
    dist.destroy_process_group()
    return {
        "world": world,
        "us": round(compressed, 1),
        "without collectives us": round(own, 1),
        "collectives alone us": round(alone, 1),
        "all_reduce us": round(exact, 1),
        "ratio": round(compressed / exact, 2),
        "bar us": BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder")
    given, made = parser.parse_args(), native._extension
    rows = [measure(world) for world in (2, 4, 8)]
    native._extension = made
    record.save("host_time", rows, given.out)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
