"""Nothing that a developer's tools warn of: our C++ with all warnings as errors, Python in its development mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized

ROOT = Path(__file__).resolve().parents[2]
HOST = sorted((ROOT / "csrc").rglob("*.cpp"))
WITH_PYTHON = "bindings"  # these need headers that are not ours


@pytest.mark.skipif(sanitized.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", [path for path in HOST if WITH_PYTHON not in path.name], ids=lambda path: path.name)
def test_compilers_warn_of_nothing(source: Path) -> None:
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        f"-I{ROOT / 'csrc'}",
        "-DFLASHCOMM_ISA=baseline",
    ]
    done = subprocess.run([sanitized.compiler() or "", *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SCRIPT = """
import torch, torch.distributed as dist
import flashcomm_megatron as fc
from flashcomm_megatron import collectives

store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
config = fc.Config(bits=4, min_bytes=0)
x = torch.randn(1000)
assert fc.decode(fc.encode(x, config), x.shape, x.dtype, config).shape == x.shape
collectives.all_reduce(x, None, config)
from flashcomm_megatron.comm.communicator import Communicator
from flashcomm_megatron.comm.shared_memory import SharedMemory
SharedMemory(dist.group.WORLD)
Communicator.of(dist.group.WORLD).close()
dist.destroy_process_group()

from pathlib import Path
from flashcomm_megatron.codec.published import ranges
from flashcomm_megatron.collectives import agreement, minimum_size
minimum_size.write(Path("thresholds.json"), "here", {})
ranges.save("ranges", {"layer": torch.zeros(2, 2, 8)}, batches=1)
ranges.load("ranges")
agreement.digest(fc.Config(bits=4, recipe="outlier", calibration="ranges", thresholds="thresholds.json"))
fc.report()
"""


def test_python_in_development_mode_warns_of_nothing_of_ours(tmp_path: Path) -> None:
    """Unclosed files, unawaited things, wrong memory use: all are printed there, with our file's name."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDEVMODE": "1"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    assert "flashcomm_megatron" not in done.stderr and "ResourceWarning" not in done.stderr, done.stderr
