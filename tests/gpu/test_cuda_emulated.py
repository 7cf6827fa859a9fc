"""The CUDA path's host code, its tests and its harness, without a GPU: on the stand-in of ``stand_ins/cuda``.

That is the code of csrc/*.cu as it is, above a runtime on the host, with fibers for threads and shared memory for that
of devices; and torch.cuda above the same. What this cannot show: the memory model and PTX, real peer access, time.

A part of the tests that need a GPU runs here, in a minute; FLASHCOMM_TEST_ALL_EMULATED=1 (make emulated) runs them all.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from codec_cases import KINDS
from patience import patient

from flashcomm_megatron.codec import native as extension

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
STAND_IN = SUPPORT / "stand_ins" / "cuda"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these tests itself, or its stand-in does"),
    pytest.mark.skipif(not extension.available(), reason=f"no extension to give a CUDA half to: {extension.reason()}"),
]

LEGS = "(Rotated(bits=4.5, block=32), Rotated(bits=5, block=64))"
CODEC, COLLECTIVES, PROCESSES, FAULTS = (
    f"tests/gpu/test_cuda_{name}.py" for name in ("codec", "collectives", "processes", "faults")
)
TRANSPORT = "tests/comm/test_transport.py"
ALL = {
    "kernels": [CODEC, COLLECTIVES, TRANSPORT, "tests/observe/test_metrics.py"],
    "processes": [PROCESSES],
    "faults": [FAULTS],
}
PART = {
    "kernels": [
        f"{CODEC}::test_codec_kernels_equal_the_definition[Uniform(bits=3, block=1000)]",
        f"{CODEC}::test_codec_kernels_equal_the_definition[Rotated(bits=4.5, block=32)]",
        f"{CODEC}::test_codec_kernels_equal_the_definition[Rotated(bits=8.0, block=256)]",
        f"{CODEC}::test_codec_kernels_equal_the_definition[Spike(bits=4, block=64)]",
        f"{CODEC}::test_codec_kernels_with_residuals_equal_the_definition[Rotated(bits=5, block=64)]",
        f"{CODEC}::test_what_a_codec_must_survive[{next(iter(KINDS))}]",
        f"{CODEC}::test_slices_are_encoded_and_decoded_as_one_by_one[Uniform(bits=4, block=32)]",
        f"{CODEC}::test_slices_are_encoded_and_decoded_as_one_by_one[Uniform(bits=3, block=1000)]",
        f"{CODEC}::test_slices_are_encoded_and_decoded_as_one_by_one[Rotated(bits=4.5, block=32)]",
        f"{CODEC}::test_slices_have_residuals_of_their_own[Rotated(bits=4.5, block=32)]",
        f"{CODEC}::test_sums_are_encoded_as_out_holds_them[{LEGS}]",
        f"{CODEC}::test_every_rank_knows_which_rows_have_kernels",
        f"{CODEC}::test_rows_that_end_inside_a_super_block_have_kernels[Rotated(bits=5, block=64)-(25600, 5120, 3)]",
        f"{CODEC}::test_rows_that_end_inside_a_super_block_have_kernels[Rotated(bits=4.5, block=32)-(25088, 3584, 2)]",
        f"{CODEC}::test_sums_of_such_rows_are_encoded_with_residuals[5120]",
        f"{TRANSPORT}::test_which_legs_have_a_fused_cuda_kernel",
        f"{TRANSPORT}::test_fused_cuda_kernels_serve_rows_of_whole_super_blocks_alone",
        f"{CODEC}::test_unaligned_views_give_the_same_bits[Uniform(bits=4, block=32)]",
        f"{COLLECTIVES}::test_any_world_kind_and_numel_equals_the_specification[2-ranks]",
        f"{COLLECTIVES}::test_inboxes_in_host_memory_give_the_same_bits[2-ranks-host]",
        f"{COLLECTIVES}::test_residuals_are_added_to_the_next_call[3-ranks-two-step]",
        f"{COLLECTIVES}::test_calls_stay_right_when_the_call_counter_wraps[2-ranks]",
        f"{COLLECTIVES}::test_negative_control_with_one_region[streams]",
        f"{COLLECTIVES}::test_a_missing_rank_is_named_at_the_deadline[streams]",
        f"{COLLECTIVES}::test_graphs_of_different_sizes_can_be_replayed_in_turns[2-ranks]",
        "tests/observe/test_metrics.py::test_sampling_on_cuda_waits_for_nothing",
    ],
    "processes": [
        f"{PROCESSES}::test_collectives_of_processes_equal_their_specification[2-peer]",
        f"{PROCESSES}::test_ranks_that_stay_name_the_one_that_left[host]",
        f"{PROCESSES}::test_a_second_stream_waits_for_the_first",
        f"{PROCESSES}::test_two_groups_launched_in_opposite_orders",
        f"{PROCESSES}::test_the_current_device_stays",
        f"{PROCESSES}::test_a_captured_call_counts_on_at_every_replay",
        f"{PROCESSES}::test_a_workspace_made_twenty_times_leaks_nothing[peer]",
    ],
    "faults": [
        f"{FAULTS}::test_ranks_fall_back_together_and_say_why_once[no-peer-access]",
        f"{FAULTS}::test_ranks_fall_back_together_and_say_why_once[neither]",
        f"{FAULTS}::test_ranks_fall_back_together_and_say_why_once[not-the-peers]",
        f"{FAULTS}::test_negative_control_inboxes_that_are_not_mapped",
        f"{FAULTS}::test_a_workspace_is_rebuilt_after_an_error",
        f"{FAULTS}::test_over_the_process_group_codec_kernels_serve",
    ],
}
HAS_TIME = os.environ.get("FLASHCOMM_TEST_ALL_EMULATED") == "1"


@pytest.fixture(scope="session")
def gpu(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that has the stand-in; built once, whichever worker comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_stand_in"
    folder.mkdir(exist_ok=True)
    module = folder / "cuda_half.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            subprocess.run([sys.executable, STAND_IN / "build.py", folder], check=True)
    path = os.pathsep.join(map(str, (STAND_IN, ROOT)))
    # Not the servers of this run, whose ranks have no stand-in.
    own = {name: value for name, value in os.environ.items() if name != forks.ADDRESS}
    return {**own, "FLASHCOMM_CUDA_STAND_IN": str(module), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(command: list[str], environment: dict[str, str], seconds: int) -> str:
    """What a command prints; it must end with 0."""
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=patient(seconds))
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-4000:]
    return found.stdout


def test_every_cuda_source_builds_on_the_stand_in(gpu):
    assert Path(gpu["FLASHCOMM_CUDA_STAND_IN"]).exists()


@pytest.mark.timeout(3600 if HAS_TIME else 240)
@pytest.mark.parametrize("part", PART)
def test_what_needs_a_gpu_passes_on_its_stand_in(gpu, tmp_path, part):
    names = ["-k", "cuda", *ALL[part]] if HAS_TIME else PART[part]
    environment = {**gpu, "PATH": with_command(tmp_path, "compute-sanitizer", 'shift 4; exec "$@"', gpu)}
    seconds = 3600 if HAS_TIME else 230
    said = run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *names], environment, seconds)
    assert HAS_TIME or f"{len(names)} passed" in said, said


def with_command(folder: Path, name: str, script: str, environment: dict[str, str]) -> str:
    """PATH with a command that the stand-in does not have, and need not."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{environment['PATH']}"


SMALL = """
import sys
from functools import partial
sys.path[:0] = ["benchmarks"]
import bench_cuda
bench_cuda.KIB, bench_cuda.MIB = 2**5, 2**7
bench_cuda.microseconds.__defaults__ = 0.0, 2
bench_cuda.graph_microseconds.__defaults__ = (3,)
made = bench_cuda.OneLaunch
bench_cuda.OneLaunch = lambda world, region=0, **options: made(world, region=2**18, **options)
sys.exit(bench_cuda.main())
"""

# What goes wrong on a GPU: a process that is killed between two rows, one whose kernel waits for a rank that never
# comes and that minds no SIGINT, and a build that fails.
KILLED = """
import json, os
for row in (1, 2):
    with open(os.environ["FLASHCOMM_CHECK_ROWS"], "a") as rows:
        rows.write(json.dumps({"section": "killed", "row": row}) + "\\n")
os.kill(os.getpid(), 9)
"""
HANGS = """
import json, os, signal, sys, torch
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:0] = ["tests/support"]
from cuda_ranks import Streams
from flashcomm_megatron.codec import Uniform
with open(os.environ["FLASHCOMM_CHECK_ROWS"], "a") as rows:
    rows.write(json.dumps({"section": "hangs", "row": 1}) + "\\n")
ranks, x = Streams(2), torch.ones(4096, dtype=torch.bfloat16, device="cuda")
ranks.run(0, "one-step", (Uniform(4, 32),) * 2, x, x, deadline=1e6)
torch.cuda.synchronize()
"""


def rehearse(gpu: dict[str, str], folder: Path, build: str, *stages: str, code: int) -> dict[str, Any]:
    """gpu_check's JSON after ``stages``, lines of Python that make batches; ``build``: what stands for the build."""
    script = f"""
import os, sys
sys.path[:0] = ["benchmarks"]
import gpu_check
from gpu_check import BENCH, COLLECTIVES, PROCESSES, Stage, tests
assert "TORCH_CUDA_ARCH_LIST" not in gpu_check.environment(gpu_check.Path("rows"))
SMALL, KILLED, HANGS = ([sys.executable, "-c", each] for each in {(SMALL, KILLED, HANGS)!r})
gpu_check.GRACE = 2.0
gpu_check.BUILD = Stage("build", [sys.executable, "-c", {build!r}], 60)
gpu_check.STAGES = [{", ".join(stages)}]
sys.exit(gpu_check.main())
"""
    environment = {**gpu, "PATH": with_command(folder, "nvcc", "exit 0", gpu), "TORCH_CUDA_ARCH_LIST": "5.0"}
    command = [sys.executable, "-c", script, "--out", str(folder / "out")]
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=patient(400))
    assert found.returncode == code, found.stdout[-8000:] + found.stderr[-4000:]
    return json.loads((folder / "out" / "gpu_check.json").read_text())


@pytest.mark.timeout(600)
def test_gpu_check_keeps_what_was_measured_before_something_broke(gpu, tmp_path):
    """A rehearsal on the stand-in: one stage is killed, one hangs in a kernel; what stands before and after counts."""
    report = rehearse(
        gpu,
        tmp_path,
        "pass",
        '[Stage("smoke", [*SMALL, "smoke"], 120)]',
        '[Stage("killed", KILLED, 60)]',
        '[Stage("hangs", HANGS, 15), Stage("fused", [*SMALL, "fused_once"], 120)]',
        '[Stage("speed", [*SMALL, "codec"], 120)]',
        '[Stage("host link", [*SMALL, "all_reduce_host"], 120)]',
        '[Stage("graphs", tests("-k", "captured_call", PROCESSES), 120)]',
        code=1,
    )
    stages, measured = report["stages"], report["measured"]
    ended = {name: stage["ended"] for name, stage in stages.items()}
    assert ended.pop("killed") == "killed by signal 9" and ended.pop("hangs") == "stopped at its deadline of 15 s"
    assert set(ended.values()) == {"passed"}, stages
    assert [row["row"] for row in measured["killed"]] == [1, 2] and measured["hangs"] == [{"row": 1}]
    for section, least in {"smoke": 40, "fused_once": 24, "codec": 15, "all_reduce_host": 15}.items():
        assert len(measured[section]) >= least, section
    assert [row["outcome"] for row in stages["graphs"]["rows"]] == ["started", "passed"]
    assert report["machine"]["gpu"] == "stand-in for a GPU"


@pytest.mark.timeout(300)
def test_gpu_check_without_its_build_tries_what_needs_none(gpu, tmp_path):
    report = rehearse(
        gpu,
        tmp_path,
        "raise SystemExit(3)",
        '[Stage("smoke", [*SMALL, "smoke"], 60)]',
        '[Stage("torch", KILLED, 60, True)]',
        code=1,
    )
    ended = {name: stage["ended"] for name, stage in report["stages"].items()}
    assert ended == {
        "build": "exit code 3",
        "smoke": "left out: the build failed",
        "torch": "killed by signal 9",
    }


def test_nobody_has_the_stand_in_unasked():
    assert importlib.util.find_spec("cuda_stand_in") is None and "stand-in" not in extension.describe()
