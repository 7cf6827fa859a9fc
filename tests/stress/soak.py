"""A long run of mixed collectives on several ranks, every one of them checked.

    python tests/stress/soak.py [--calls 200000] [--ranks 4] [--seed 1] [--out FILE.json]

Kind, shape, dtype, recipe, width, algorithm and transport are drawn anew for every call; one to four calls are under
way at once and are waited for in any order, the same on all ranks. Half the tensors are stairs, constant over 128
values, which every width carries exactly: their sums are compared with the true ones. Of all results that ranks must
share, checksums are compared between the ranks; one call in a hundred is compared bit for bit with the specification.
The resident memory is read at a tenth of the way, half way (the cache of plans is full by then) and at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import resource
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
import torch.distributed as dist
from ranks import spawn
from record import circumstances
from specification import expected, planned, same
from torch import Tensor

from flashcomm_megatron import collectives
from flashcomm_megatron.config import Config

STAIR = 128  # values that are alike: a multiple of every block in use
LARGEST = 20_000  # values of one rank's tensor
COMPARED = 500  # calls whose checksums travel together
SPECIFIED = 100  # one call in so many is compared with the specification
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("all_reduce", "reduce_scatter", "all_gather")
NATIVE = [
    Config(bits, recipe=recipe, algorithm=algorithm, transport=transport, min_bytes=0)
    for recipe, widths in {"auto": (2, 3, 4, 5, 6, 8), "flash-v1": (4, 6, 8)}.items()
    for bits in widths
    for algorithm in ("one-step", "two-step")
    for transport in ("shared-memory", "group")
]
IN_TORCH = [Config(4, recipe=recipe, transport="shared-memory", min_bytes=0) for recipe in ("flash-v2", "mx", "mx-int")]


class Drawn(NamedTuple):
    """One call, the same on every rank."""

    kind: str
    config: Config
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_exact: bool
    seed: int


class UnderWay(NamedTuple):
    """A call, its input as it was, and what to wait for."""

    call: Drawn
    x: Tensor
    handle: Any


def draw(dice: random.Random, world: int) -> Drawn:
    """The next call."""
    in_torch = dice.random() < 0.005
    config = dice.choice(IN_TORCH if in_torch else NATIVE)
    rows = dice.choice((1, 1, 2, 3, 5))
    values = int((400 if in_torch else LARGEST) ** dice.random()) // rows + 1
    shape = (rows * world, values // world + 1)
    is_exact = dice.random() < 0.5 and not in_torch
    return Drawn(dice.choice(KINDS), config, dice.choice(DTYPES), shape, is_exact, dice.getrandbits(31))


def payload(call: Drawn, rank: int, world: int) -> Tensor:
    """The tensor of ``rank``: stairs of small integers that begin anew in every row, or anything."""
    generator = torch.Generator().manual_seed(call.seed * 64 + rank)
    rows, width = call.shape
    if not call.is_exact:
        return torch.randn(rows, width, generator=generator).to(call.dtype)
    stairs = torch.randint(-60 // world * 4, 60 // world * 4, (rows, -(-width // STAIR)), generator=generator)
    return stairs.repeat_interleave(STAIR, dim=1)[:, :width].to(call.dtype)


def wanted(call: Drawn, parts: list[Tensor], rank: int) -> Tensor:
    """What the call returns on ``rank``, by the specification, flat."""
    world, kind = len(parts), call.kind
    plan = planned(kind, parts[0], world, call.config)
    kind = plan.algorithm if kind == "all_reduce" else kind
    return expected(kind, (plan.reduce, plan.gather), parts)[rank].view(-1)


def truth(call: Drawn, parts: list[Tensor], rank: int) -> Tensor:
    """What the exact collective returns on ``rank``, flat."""
    if call.kind == "all_gather":
        return torch.cat(parts).view(-1)
    total = torch.stack([part.float() for part in parts]).sum(0).to(call.dtype)
    return (total.chunk(len(parts))[rank] if call.kind == "reduce_scatter" else total).reshape(-1)


def checksum(x: Tensor) -> int:
    """Of the bits of ``x``."""
    return zlib.crc32(ctypes.string_at(x.data_ptr(), x.nbytes))


class Soak:
    """One rank's run."""

    def __init__(self, rank: int, world: int, seed: int) -> None:
        self.rank, self.world = rank, world
        self.dice = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.checksums: list[int] = []

    def step(self) -> None:
        """Start a few calls and wait for them in any order."""
        started = [self.start(draw(self.dice, self.world)) for _ in range(self.dice.randint(1, 4))]
        order = self.dice.sample(range(len(started)), len(started))
        results = {i: started[i].handle.wait() for i in order}
        for i, each in enumerate(started):
            self.check(each, results[i])
        if len(self.checksums) >= COMPARED:
            self.compare()

    def start(self, call: Drawn) -> UnderWay:
        x = payload(call, self.rank, self.world)
        self.done["calls"] += 1
        self.done[f"{call.kind} {call.config.recipe} {call.config.transport}"] += 1
        return UnderWay(call, x, getattr(collectives, call.kind)(x.clone(), None, call.config, async_op=True))

    def check(self, each: UnderWay, result: Tensor) -> None:
        """Against the true sum where it is exact, now and then against the specification, and note its checksum."""
        call, parts = each.call, []
        is_specified = self.done["checked"] % SPECIFIED == 0
        self.done["checked"] += 1
        if call.is_exact or is_specified:
            parts = [payload(call, rank, self.world) for rank in range(self.world)]
        if call.is_exact:
            self.done["exact"] += 1
            assert torch.equal(result.view(-1), truth(call, parts, self.rank)), f"not exact: {call}"
        if is_specified:
            self.done["specified"] += 1
            assert same(result.view(-1), wanted(call, parts, self.rank)), f"not as specified: {call}"
        self.checksums.append(0 if call.kind == "reduce_scatter" else checksum(result))

    def compare(self) -> None:
        """Checksums of the last calls with those of all other ranks."""
        mine = torch.tensor(self.checksums)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine)
        assert all(torch.equal(each, mine) for each in everyone), "ranks hold different results"
        self.done["compared"] += len(self.checksums)
        self.checksums = []


def run(rank: int, world: int, calls: int, seed: int) -> dict[str, Any]:
    """``calls`` collectives; what was done, and the memory in KiB on the way and at the end."""
    soak, memory, started = Soak(rank, world, seed), {}, time.monotonic()
    marks = {"KiB early": calls // 10, "KiB half": calls // 2}
    while soak.done["calls"] < calls:
        soak.step()
        for name in [name for name, mark in marks.items() if soak.done["calls"] >= mark]:
            memory[name] = resident()
            del marks[name]
    soak.compare()
    seconds = round(time.monotonic() - started, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**memory, "KiB late": resident(), "KiB peak": peak, "seconds": seconds, **soak.done}


def resident() -> int:
    """Memory of this process in main memory, in KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def main(words: list[str]) -> int:
    """The command line of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(words)
    rows = spawn(run, asked.ranks, asked.calls, asked.seed, seconds=7 * 24 * 3600.0)
    text = json.dumps({"circumstances": circumstances(), "seed": asked.seed, "ranks": rows}, indent=1) + "\n"
    print(text)
    if asked.out:
        asked.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
