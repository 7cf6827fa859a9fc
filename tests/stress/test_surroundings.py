"""What surrounds the ranks of a job, and must neither stop nor change a sum.

Signals by the thousand, other numbers of threads on every rank, a rank that has no descriptors left, a full /dev/shm
beside DataLoader workers, ranks that wait while another one computes, and Python's development mode.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import patient
from ranks import spawn
from torch import Tensor

import flashcomm_megatron as fc
from flashcomm_megatron.codec.published import ranges
from flashcomm_megatron.collectives import all_reduce, thresholds

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TRANSPORTS = ["host", "group"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def config(transport: str) -> fc.Config:
    return fc.Config(bits=4, transport=transport, min_bytes=0)  # type: ignore[arg-type]


def part(rank: int, call: int = 0) -> Tensor:
    """Stairs of small integers, which every width carries exactly."""
    steps = torch.randint(-9, 9, (160,), generator=torch.Generator().manual_seed(100 * call + rank))
    return steps.float().repeat_interleave(512)


def is_right(rank: int, world: int, transport: str, call: int = 0) -> bool:
    """Whether one sum over the world is exact."""
    total = torch.stack([part(r, call) for r in range(world)]).sum(0)
    return torch.equal(all_reduce(part(rank, call), None, config(transport)), total)


# ---- signals ----------------------------------------------------------------------------------------------------


def under_alarms(rank: int, world: int, transport: str) -> tuple[int, int]:
    """Calls that were right, and alarms that Python heard of."""
    heard = [0]

    def hear(*_: object) -> None:
        heard[0] += 1

    signal.signal(signal.SIGALRM, hear)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    right = sum(is_right(rank, world, transport, call) for call in range(60))
    signal.setitimer(signal.ITIMER_REAL, 0)
    return right, heard[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_thousand_alarms_a_second_change_no_sum(transport: str) -> None:
    for right, heard in spawn(under_alarms, 3, transport):
        assert right == 60 and heard > 10


# ---- threads ----------------------------------------------------------------------------------------------------


def with_threads(rank: int, world: int, transport: str) -> Tensor:
    torch.set_num_threads(1 + rank)
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(rank))
    return all_reduce(x, None, config(transport))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_with_other_numbers_of_threads_hold_the_same_bits(transport: str) -> None:
    first, *others = spawn(with_threads, 3, transport)
    assert all(torch.equal(first, other) for other in others)


# ---- descriptors ------------------------------------------------------------------------------------------------


def without_descriptors(rank: int, world: int, transport: str, left: int) -> tuple[bool, bool]:
    """Whether a sum is right with ``left`` descriptors on rank 1, and another one with as many as before."""
    dist.barrier()  # the process group has what it needs
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if rank == 1:
        used = max(map(int, os.listdir("/proc/self/fd"))) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + left, before[1]))
    scarce = is_right(rank, world, transport, 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    return scarce, is_right(rank, world, transport, 1)


@pytest.mark.parametrize("left", [0, 1, 2])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_without_descriptors_falls_back_with_the_others(transport: str, left: int) -> None:
    assert spawn(without_descriptors, 3, transport, left) == [(True, True)] * 3


# ---- /dev/shm ---------------------------------------------------------------------------------------------------

LOADING = """
import torch.distributed as dist, test_surroundings
dist.init_process_group("gloo")
print("found", *test_surroundings.loading(dist.get_rank(), 2))
"""


class Rows(torch.utils.data.Dataset[Tensor]):
    """A data set of rows that hold their own number."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, row: int) -> Tensor:
        return torch.full((512,), float(row))


def loading(rank: int, world: int) -> tuple[bool, float]:
    """Whether sums between the batches of a DataLoader are right, and the sum of its first column."""
    loader = torch.utils.data.DataLoader(Rows(), batch_size=8, num_workers=2, multiprocessing_context="fork")
    right, total = True, 0.0
    for call, batch in enumerate(loader):
        right &= is_right(rank, world, "host", call)
        total += float(batch[:, 0].sum())
    return right, total


@pytest.mark.parametrize("kib", [1024, 65536])
def test_loader_workers_and_ranks_share_a_small_dev_shm(tmp_path: Path, kib: int) -> None:
    """1 MiB: the workers' batches fit, the ranks' segments do not, and the ranks use the process group."""
    if os.getuid() or shutil.which("unshare") is None:
        pytest.skip("mounting a small /dev/shm needs root and unshare")
    (tmp_path / "script.py").write_text(LOADING)
    inside = f"mount -t tmpfs -o size={kib}k tmpfs /dev/shm && exec {' '.join(TORCHRUN)} {tmp_path / 'script.py'}"
    folders = [ROOT, ROOT / "tests" / "support", ROOT / "tests" / "stress"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    command = ["unshare", "--mount", "sh", "-c", inside]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patient(120))
    if "unshare" in ran.stderr or "mount:" in ran.stderr:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("found True 2016.0") == 2
    assert ran.stdout.count("/dev/shm: No space left on device") == (kib == 1024)


# ---- waiting ----------------------------------------------------------------------------------------------------


def one_computes(rank: int, world: int, transport: str) -> tuple[float, float]:
    """Seconds that rank 0 lets the others wait, and how many of a processor this rank used meanwhile."""
    is_right(rank, world, transport)
    dist.barrier()
    started, used = time.monotonic(), time.process_time()
    if rank == 0:
        time.sleep(3.0)  # stands for computing: what the others use is what it would lose
    is_right(rank, world, transport)
    return time.monotonic() - started, time.process_time() - used


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_three_ranks_that_wait_leave_the_processor_to_one_that_computes(transport: str) -> None:
    _, *waiting = spawn(one_computes, 4, transport)
    share = sum(used for _, used in waiting) / waiting[0][0]
    assert share < 0.03 * 2, f"three waiting ranks use {share:.1%} of a processor"  # of two cores, 3 %


# ---- development mode -------------------------------------------------------------------------------------------

DEVELOPING = """
import test_surroundings
from ranks import spawn
if __name__ == "__main__":
    assert spawn(test_surroundings.every_file_and_call, 2) == [None] * 2
"""


def every_file_and_call(rank: int, world: int) -> None:
    """Whatever opens files, memory or connections."""
    x, four = torch.randn(1000), config("host")
    assert fc.decode(fc.encode(x, four), x.shape, x.dtype, four).shape == x.shape
    assert all(is_right(rank, world, transport) for transport in TRANSPORTS)
    folder = Path(f"files-{rank}")
    folder.mkdir()
    thresholds.write(folder / "thresholds.json", "here", {})
    ranges.save(str(folder / "ranges"), {"layer": torch.zeros(2, 2, 8)}, batches=1)
    ranges.load(str(folder / "ranges"))
    fc.enable(bits=4, metrics=str(folder / "metrics.jsonl"))
    fc.log_metrics(1, {"loss": 2.0})
    fc.report()
    fc.disable()


def test_development_mode_warns_of_nothing_of_ours(tmp_path: Path) -> None:
    """Unclosed files, unawaited things, wrong memory use: all are printed there, with our file's name."""
    (tmp_path / "script.py").write_text(DEVELOPING)
    folders = [ROOT, ROOT / "tests" / "support", ROOT / "tests" / "stress"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    command: list[Any] = [sys.executable, "-X", "dev", tmp_path / "script.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=patient(120))
    assert ran.returncode == 0, ran.stderr
    assert "flashcomm_megatron" not in ran.stderr and "ResourceWarning" not in ran.stderr, ran.stderr
