"""Thresholds: defaults by place, files of measured ones and what is refused, and the measuring itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import patient

from flashcomm_megatron.collectives import plan as policy
from flashcomm_megatron.collectives import thresholds
from flashcomm_megatron.collectives.thresholds import Case
from flashcomm_megatron.comm.wire import Wire
from flashcomm_megatron.config import Config
from flashcomm_megatron.tools import tune as tuning
from flashcomm_megatron.tools.tune import Timing

CASE = Case("all_reduce", "bfloat16", 4, "auto")
CPU = Wire("cpu", (0, 0))


def place(world: int) -> str:
    return thresholds.place(world, CPU)


def reason(numel: int, wire: Wire | None, **options: object) -> str | None:
    x = torch.empty(1, dtype=torch.bfloat16).expand(numel)
    return policy.plan("all_reduce", x, 2, Config(bits=4, **options), wire=wire).reason


@pytest.mark.parametrize("wire", [None, Wire("shared memory", (0, 0)), Wire("connections", (0, 1))])
def test_over_streams_compression_starts_earlier_than_over_the_process_group(wire: Wire | None) -> None:
    assert reason(512, wire) is None
    assert reason(511, wire) == "below 1024 bytes"
    gathered = policy.plan("all_gather", torch.empty(8191), 2, Config(bits=4), wire=wire)
    assert gathered.reason == "below 32768 bytes"
    assert reason(1024, None, transport="group") == reason(1024, Wire("cpu", (0, 1))) == "below 262144 bytes"
    assert reason(131072, Wire("cpu", (0, 1))) is None


def test_a_measured_file_decides_for_its_cases_and_its_number_of_ranks(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    thresholds.write(path, place(2), {CASE: 4096})
    thresholds.write(path, place(4), {CASE: thresholds.NEVER})
    config = Config(bits=4, thresholds=str(path))
    assert thresholds.least(CASE, 2, CPU, config) == 4096
    assert thresholds.least(CASE, 4, CPU, config) == thresholds.NEVER, "one number of ranks does not erase another"
    assert thresholds.least(CASE, 8, CPU, config) == thresholds.DEFAULTS["cpu"]
    assert thresholds.least(CASE._replace(bits=8), 2, CPU, config) == thresholds.DEFAULTS["cpu"]
    assert thresholds.least(CASE, 2, CPU._replace(nodes=(0, 1)), config) == thresholds.DEFAULTS["cpu"]
    asked = Config(bits=4, thresholds=str(path), min_bytes=7)
    assert thresholds.least(CASE, 2, CPU, asked) == 7, "what the user says comes first"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "No such file"),
        ("no json", "no file of thresholds"),
        ("[]", "no file of thresholds"),
        ('{"circumstances": [], "least bytes by place": {}}', "no file of thresholds"),
        (
            '{"circumstances": {}, "least bytes by place": {"2 ranks, 1 machines, cpu": [["all_reduce", 1]]}}',
            "no file of thresholds",
        ),
        ('{"circumstances": {"torch": "1.0"}, "least bytes by place": {}}', "torch 1.0, here"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "tuned.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        thresholds.read(str(path))
    assert "bench --tune" in str(error.value) and str(path) in str(error.value)


def test_the_threshold_is_where_all_larger_sizes_pay() -> None:
    faster, slower, noisy = (1.0, 0.5, 0.1), (1.0, 1.2, 0.1), (1.0, 0.97, 0.2)
    assert tuning.threshold([Timing(1, *slower), Timing(2, *faster), Timing(4, *faster)]) == 2
    assert tuning.threshold([Timing(1, *faster), Timing(2, *noisy), Timing(4, *faster)]) == 4
    assert tuning.threshold([Timing(1, *faster), Timing(2, *slower)]) == thresholds.NEVER


def test_bench_measures_on_real_ranks_and_its_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    script = f"import sys, flashcomm_megatron.tools.tune as t; t.SIZES, t.SECONDS = (1 << 10, 1 << 16), 0.01; " \
             f"sys.exit(t.main(['--tune', {str(path)!r}, '--bits', '4']))"  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(20000 + os.getpid() % 20000)}
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=patient(120))[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "all_reduce" in outputs[0] and not outputs[1]
    rows = json.loads(path.read_text())["least bytes by place"]["2 ranks, 1 machines, shared memory"]
    assert [row[0] for row in rows] == list(tuning.KINDS)
    assert all(row[4] in (1 << 10, 1 << 16, thresholds.NEVER) for row in rows)
    assert thresholds.read(str(path))["2 ranks, 1 machines, shared memory"].keys() == {
        CASE._replace(collective=kind) for kind in tuning.KINDS
    }


def test_bench_alone_says_what_it_needs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, "-m", "flashcomm_megatron", "bench"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "torchrun" in done.stderr
