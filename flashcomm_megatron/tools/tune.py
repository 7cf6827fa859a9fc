"""``bench``: measure, on the ranks and links that are there, from which size on compression pays.

    torchrun --nproc-per-node 4 -m flashcomm_megatron bench                     prints what was measured
    torchrun --nproc-per-node 4 -m flashcomm_megatron bench --tune tuned.json   and writes thresholds for the flag

Every collective is timed at growing sizes against torch.distributed's, in turns. The threshold is the size from which
on all larger ones were faster by more than the noise of the exact call; where the largest was not, the answer is never.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from .. import collectives
from ..codec.recipes import RECIPES
from ..collectives import minimum_size
from ..collectives.minimum_size import Case
from ..comm.communicator import Communicator
from ..config import Config

KINDS = ("all_reduce", "reduce_scatter", "all_gather")
SIZES = tuple(1 << power for power in range(10, 25, 2))  # bytes of each rank's input: 1 KiB to 16 MiB
LEAST_REPEATS, SECONDS = 5, 0.3


class Timing(NamedTuple):
    """One size: seconds of both, medians of the slowest rank's, and the spread of the exact ones."""

    nbytes: int
    exact: float
    quantized: float
    noise: float

    @property
    def pays(self) -> bool:
        """Faster by more than the noise."""
        return self.quantized * (1 + self.noise / 2) < self.exact


def main(argv: list[str]) -> int:
    """``python -m flashcomm_megatron bench``, on every rank."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcomm_megatron bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tune", type=Path, metavar="FILE", help="write thresholds for --flash-comm-thresholds")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument(
        "--recipe", choices=[name for name, row in RECIPES.items() if not row.calibrated], default="auto"
    )
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    options = parser.parse_args(argv)

    def refuse(reason: str) -> None:
        parser.exit(2, f"{parser.prog}: error: {reason}.\n")

    if "RANK" not in os.environ:
        refuse("needs its ranks: torchrun --nproc-per-node N -m flashcomm_megatron bench")
    widths = RECIPES[options.recipe].widths
    unknown = [bits for bits in options.bits if bits not in widths]
    if unknown:
        refuse(f"--bits {unknown}: recipe {options.recipe} has {widths}")
    if options.tune is not None and (reason := minimum_size.unwritable(options.tune)):
        refuse(f"--tune {options.tune}: {reason}")
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
    if dist.get_world_size() == 1:
        refuse("one rank sends nothing: torchrun --nproc-per-node 2 or more")
    rows: dict[Case, int] = {}
    for kind, dtype, bits in itertools.product(KINDS, options.dtype, options.bits):
        case = Case(kind, dtype, bits, options.recipe)
        rows[case] = threshold([measure(case, nbytes) for nbytes in SIZES])
        result = "never faster here" if rows[case] == minimum_size.NEVER else f"from {rows[case]} bytes on"
        _say(f"{kind:15} {dtype:9} {bits} bits  {result}")
    if options.tune is not None:
        if dist.get_rank() == 0:
            group = dist.group.WORLD
            assert group is not None
            comm, config = Communicator.of(group), Config(bits=options.bits[0], recipe=options.recipe)
            place = minimum_size.topology_of(comm.world, comm.nodes, comm.transport_name(_device(), config))
            minimum_size.write(options.tune, place, rows)
        _say(f"wrote {options.tune}: use it with --flash-comm-thresholds {options.tune}")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def threshold(timings: Sequence[Timing]) -> int:
    """The size from which on all larger ones pay."""
    losing = [timing.nbytes for timing in timings if not timing.pays]
    larger = [timing.nbytes for timing in timings if timing.nbytes > max(losing, default=0)]
    return min(larger, default=minimum_size.NEVER)


def measure(case: Case, nbytes: int) -> Timing:
    """One case at one size."""
    dtype, config = getattr(torch, case.dtype), Config(bits=case.bits, recipe=case.recipe, min_bytes=0)
    calls = _calls(case.collective, nbytes // dtype.itemsize, dtype, config)
    times: list[list[float]] = [[], []]
    for call in calls:
        call()
    began = time.perf_counter()
    while True:
        for number, call in enumerate(calls):
            times[number].append(_slowest(call))
        late = torch.tensor(float(time.perf_counter() - began > SECONDS), device=_device())
        dist.all_reduce(late, dist.ReduceOp.MAX)
        if len(times[0]) >= LEAST_REPEATS and late:
            break
    exact, quantized = (statistics.median(each) for each in times)
    first, _, third = statistics.quantiles(times[0], n=4)
    return Timing(nbytes, exact, quantized, (third - first) / exact)


def _calls(kind: str, numel: int, dtype: torch.dtype, config: Config) -> tuple[Callable[[], object], ...]:
    """torch.distributed's collective and ours with ``numel`` values as each rank's input."""
    world = dist.get_world_size()
    share = -(-numel // world) * world
    x = torch.randn(share, dtype=torch.float32).to(device=_device(), dtype=dtype)
    if kind == "all_reduce":
        zeros = torch.zeros_like(x)  # sums of zeros stay zeros; the exact call takes as long for any values
        return lambda: dist.all_reduce(zeros), lambda: collectives.all_reduce(x.mul_(1 / world), None, config)
    out = x.new_empty(share // world if kind == "reduce_scatter" else share * world)
    exact = dist.reduce_scatter_tensor if kind == "reduce_scatter" else dist.all_gather_into_tensor
    ours = getattr(collectives, kind)
    return lambda: exact(out, x), lambda: ours(x, None, config, out=out)


def _slowest(call: Callable[[], object]) -> float:
    """Seconds of one call that all ranks begin together, of the slowest rank."""
    dist.barrier()
    _finish()
    started = time.perf_counter()
    call()
    _finish()
    taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=_device())
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _finish() -> None:
    if dist.get_backend() == "nccl":
        torch.cuda.synchronize()


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)
