"""What can be said of the CUDA code without a GPU: it compiles for every architecture, spills nothing, and fails well.

One number type is compiled for the oldest architecture, another for the newest; FLASHCOMM_TEST_ALL_KERNELS=1 compiles
all for all.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
import setuptools
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


SOURCES = ["codec_part", "collective_part"]  # with the kernels of one part: csrc/cuda/instances.h
PARTS = list(product(("BFloat16", "Float16", "Float32"), (1, 0)))
KERNELS = {("codec_part", 1): 9, ("codec_part", 0): 8, ("collective_part", 1): 3, ("collective_part", 0): 3}


def compiled(root: Path, folder: Path, source: str, architecture: str, *flags: str) -> str:
    """What nvcc and ptxas say while they compile a source for one architecture."""
    if architecture not in known_architectures():
        pytest.skip(f"this nvcc does not know {architecture}")
    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    command = [str(nvcc), *FLAGS, *flags, target, f"csrc/cuda/{source}.cu", "-o", str(folder / "out.o")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(nvcc is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "uniform"), PARTS)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_and_spills_nothing(root, tmp_path, source, dtype, uniform, architecture):
    has_time = os.environ.get("FLASHCOMM_TEST_ALL_KERNELS") == "1"
    if (dtype, architecture) not in (("BFloat16", "sm_80"), ("Float32", "sm_120")) and not has_time:
        pytest.skip("half a minute each: FLASHCOMM_TEST_ALL_KERNELS=1 compiles all parts for all architectures")
    part = f"-DFLASHCOMM_PART_TYPE={dtype}", f"-DFLASHCOMM_PART_UNIFORM={uniform}"
    report = compiled(root, tmp_path, source, architecture, *part)
    kernels = re.findall(r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill", report, re.DOTALL)
    assert len(kernels) >= KERNELS[source, uniform], "ptxas reports every kernel"
    spilling = [name for name, stack, spilled in kernels if int(stack) or int(spilled)]
    assert not spilling, "a kernel spills registers or keeps an array in local memory"


@pytest.mark.slow
@pytest.mark.skipif(nvcc is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source", ["codec_cuda", "collectives", "shared_memory"])
def test_host_code_compiles(root, tmp_path, source):
    compiled(root, tmp_path, source, "sm_90")


@pytest.mark.skipif(extension.cuda() is None, reason=f"no CUDA kernels: {extension.reason()}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_driver_a_cuda_call_says_what_is_wrong():
    cuda = extension.cuda()
    assert cuda is not None and cuda.has_collective(cuda.Leg(1, 9, 32), cuda.Leg(1, 10, 64), 2)
    for call in (
        lambda: cuda.device_blocks(0),
        lambda: cuda.device_allocate(0, 16),
        *(lambda f=f: cuda.encode_slices_cuda(16, 0, 2, (f, 4, 32), 0, 8, 8, 1, 0, 16, 0) for f in (0, 1, 2)),
    ):
        with pytest.raises(RuntimeError, match=r"^flash-comm: .* on CUDA failed: .*\(cudaError\w+\)$"):
            call()


def test_sources_that_the_build_names_exist(root):
    """Every file of csrc that the build names exists, and an sdist takes headers along."""
    named = re.findall(r'"((?:\w+/)?\w+\.(?:cu|cpp))"', (root / "setup.py").read_text())
    assert named and all((root / "csrc" / name).exists() for name in named)
    assert "csrc" in (Path(root) / "MANIFEST.in").read_text()


@pytest.mark.parametrize(
    ("commands", "wanted", "with_cuda", "says"),
    [
        ([], "", False, "without nvcc"),
        (["nvcc"], "", False, "FLASHCOMM_CUDA=1 builds CUDA kernels"),
        (["nvcc"], "1", True, ""),
        (["nvcc", "nvidia-smi"], "", True, ""),
        (["nvcc", "nvidia-smi"], "0", False, "FLASHCOMM_CUDA=0"),
    ],
    ids=["no-nvcc", "no-gpu", "asked-for", "gpu", "refused"],
)
def test_cuda_is_built_where_a_gpu_is_or_it_is_asked_for(
    root, tmp_path, monkeypatch, commands, wanted, with_cuda, says
):
    for name in commands:
        (tmp_path / name).write_text("#!/bin/sh\necho 9.0\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FLASHCOMM_CUDA", wanted)
    monkeypatch.chdir(root)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    found, reason = runpy.run_path("setup.py")["find_nvcc"]()
    assert bool(found) == with_cuda and says in reason
