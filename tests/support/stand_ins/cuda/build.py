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
SOURCES = [CSRC / name for name in ("cuda/collectives.cu", "cuda/codec_cuda.cu", "cuda/shared_memory.cu")]
SOURCES += [CSRC / "bindings_cuda.cpp", *(HERE / name for name in ("module.cpp", "runtime.cpp", "fibers.cpp"))]
# As in setup.py: once for every part of csrc/cuda/instances.h.
IN_PARTS = [CSRC / "cuda" / name for name in ("collective_part.cu", "codec_part.cu")]
PARTS = [(dtype, uniform) for dtype in ("Float32", "Float16", "BFloat16") for uniform in (1, 0)]
# Names of its own, lest its types meet those of an extension that was built with nvcc.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra"]
FLAGS += [
    "-Werror",
    "-fno-omit-frame-pointer",
    "-fno-thread-jumps",
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
    jobs = [(source, ()) for source in SOURCES] + [(source, part) for source in IN_PARTS for part in PARTS]
    objects = [folder / f"{'-'.join(map(str, (source.stem, *part)))}.o" for source, part in jobs]

    def compile(job: tuple[Path, tuple[()] | tuple[str, int]], target: Path) -> None:
        source, part = job
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        headers = HEADERS if source.name in ("bindings_cuda.cpp", "module.cpp") else []
        which = [f"-DFLASHCOMM_PART_TYPE={part[0]}", f"-DFLASHCOMM_PART_UNIFORM={part[1]}"] if part else []
        subprocess.run([compiler, *FLAGS, *which, *headers, *language, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile, jobs, objects))
    module = folder / "cuda_half.so"
    subprocess.run([compiler, "-shared", "-pthread", *objects, f"-L{TORCH / 'lib'}", "-lc10", "-o", module], check=True)
    return module


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
