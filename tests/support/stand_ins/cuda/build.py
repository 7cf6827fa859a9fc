"""Builds ``cuda_half``: csrc/'s CUDA sources, as they are, on the stand-in runtime, with the system's compiler.

run as:  python tests/support/stand_ins/cuda/build.py FOLDER
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[3] / "csrc"
SOURCES = [
    CSRC / name for name in ("cuda/collectives.cu", "cuda/codec_cuda.cu", "cuda/shared_memory.cu", "bindings_cuda.cpp")
]
SOURCES += [HERE / name for name in ("module.cpp", "runtime.cpp", "fibers.cpp")]
# Names of its own, lest its types meet those of an extension that was built with nvcc.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra"]
FLAGS += [
    "-Werror",
    "-fno-omit-frame-pointer",
    "-Dflashcomm=flashcomm_stand_in",
    "-DFLASHCOMM_ISA=emulated",
    f"-I{HERE}",
    f"-I{CSRC}",
]
TORCH = Path(torch.__file__).parent
HEADERS = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"), TORCH / "include")]


def build(folder: Path) -> Path:
    """The module, compiled into ``folder``."""
    compiler = shutil.which(os.environ.get("CXX", "g++").split()[0]) or "c++"
    objects = [folder / f"{source.name}.o" for source in SOURCES]

    def compile(source: Path, target: Path) -> None:
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        headers = HEADERS if source.name in ("bindings_cuda.cpp", "module.cpp") else []
        subprocess.run([compiler, *FLAGS, *headers, *language, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile, SOURCES, objects))
    module = folder / "cuda_half.so"
    subprocess.run([compiler, "-shared", "-pthread", *objects, f"-L{TORCH / 'lib'}", "-lc10", "-o", module], check=True)
    return module


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
