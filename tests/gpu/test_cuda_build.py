"""What can be said of the CUDA code without a GPU: it compiles for every architecture, spills nothing, and fails well.

Collectives are compiled for every width of one number type or another, and for the oldest and the newest architecture;
FLASHCOMM_TEST_ALL_KERNELS=1 compiles all for all, seven minutes on two cores.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from flashcomm_megatron.codec import native as extension

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
FLAGS = ["-Icsrc", "-std=c++17", "-O3", "-fmad=false", "-DFLASHCOMM_ISA=cuda", "-Xptxas=-v", "-c"]
nvcc = shutil.which("nvcc")


@lru_cache
def known_architectures() -> list[str]:
    """What the installed nvcc can compile for."""
    assert nvcc is not None
    return subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(nvcc is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["codec_cuda", "collectives", "shared_memory"])
def test_compiles_and_spills_nothing(root, tmp_path, source, architecture):
    if architecture not in known_architectures():
        pytest.skip(f"this nvcc does not know {architecture}")
    has_time = os.environ.get("FLASHCOMM_TEST_ALL_KERNELS") == "1"
    if source == "collectives" and architecture not in ("sm_80", "sm_120") and not has_time:
        pytest.skip("two minutes each: FLASHCOMM_TEST_ALL_KERNELS=1 compiles the architectures between as well")
    few = [] if has_time else ["-DFLASHCOMM_FEW_COLLECTIVES"]
    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    command = [nvcc, *FLAGS, *few, target, f"csrc/cuda/{source}.cu", "-o", str(tmp_path / "out.o")]
    compiled = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    report = compiled.stdout + compiled.stderr
    kernels = re.findall(r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill", report, re.DOTALL)
    assert len(kernels) >= {"codec_cuda": 60, "collectives": 18, "shared_memory": 0}[source], (
        "ptxas reports every kernel"
    )
    spilling = [name for name, stack, spilled in kernels if (stack, spilled) != ("0", "0")]
    assert not spilling, "a kernel spills registers or keeps an array in local memory"


@pytest.mark.skipif(extension.cuda() is None, reason=f"no CUDA kernels: {extension.reason()}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_driver_a_cuda_call_says_what_is_wrong():
    cuda = extension.cuda()
    assert cuda is not None and cuda.has_collective(cuda.Leg(1, 9, 32), cuda.Leg(1, 10, 64), 2)
    for call in (
        lambda: cuda.device_blocks(0),
        lambda: cuda.device_allocate(0, 16),
        *(lambda f=f: cuda.encode_cuda(16, 2, 8, f, 4, 32, 16, 0, 0) for f in (0, 1, 2)),
    ):
        with pytest.raises(RuntimeError, match=r"^flash-comm: .* on CUDA failed: .*\(cudaError\w+\)$"):
            call()


def test_sources_ship(root):
    """Every file of csrc that the build names exists, and an sdist takes headers along."""
    named = re.findall(r'"((?:\w+/)?\w+\.(?:cu|cpp))"', (root / "setup.py").read_text())
    assert named and all((root / "csrc" / name).exists() for name in named)
    assert "csrc" in (Path(root) / "MANIFEST.in").read_text()
