"""Builds flashcomm_megatron._C from csrc/ with g++ or clang++ and, for GPUs, nvcc; the rest is pyproject.toml.

The CPU codec is compiled once for every instruction set and chooses when it runs, so one build serves every machine
of an architecture. No torch header is used, so it also serves every torch. ccache is used where it is installed.

    FLASHCOMM_CUDA=0 | 1      without | with CUDA kernels; by default with them where a GPU and nvcc are found
    TORCH_CUDA_ARCH_LIST      GPU architectures as for torch; default: the GPUs present, else "8.0;9.0+PTX"
    FLASHCOMM_WERROR=1        warnings of our own sources are errors
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
CACHE = ["ccache"] if shutil.which("ccache") else []
CODEC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]  # never -ffast-math: NaN must survive
INCLUDE = f"-I{CSRC}"  # sources name headers from there: "format/codec.h"
COMMON = [INCLUDE, "-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-pthread"]
CUDA = [INCLUDE, "-std=c++17", "-O3", "-fmad=false", "-DFLASHCOMM_ISA=cuda"]
CUDA_SOURCES = ["cuda/collectives.cu", "cuda/codec_cuda.cu", "cuda/shared_memory.cu"]
# Compiled once for every part of csrc/cuda/instances.h, so that many cores share the work; the longest first.
CUDA_IN_PARTS = ["cuda/collective_part.cu", "cuda/codec_part.cu"]
PARTS = [(dtype, uniform) for uniform in (1, 0) for dtype in ("BFloat16", "Float16", "Float32")]
CPU_SOURCES = ("cpu/codec_cpu.cpp", "cpu/rotated_cpu.cpp", "cpu/spike_cpu.cpp")  # once for every instruction set
HOST_SOURCES = ("cpu/streams.cpp", "cpu/ring.cpp", "cpu/codec_threads.cpp")
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": AVX512,
        "avx512bf16": [*AVX512, "-mavx512bf16"],
    }


def find_nvcc() -> tuple[str | None, str]:
    """Path of nvcc, or None and the reason."""
    wanted = os.environ.get("FLASHCOMM_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(
            f"FLASHCOMM_CUDA={wanted}: choose 0 (without CUDA) or 1 (with it), or unset it (where a GPU is)."
        )
    nvcc = shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        raise SystemExit("FLASHCOMM_CUDA=1 but nvcc is not on PATH: install the CUDA toolkit or unset FLASHCOMM_CUDA.")
    if wanted == "0":
        return None, "built with FLASHCOMM_CUDA=0"
    if nvcc is None:
        return None, "built without nvcc"
    if wanted == "" and not present_architectures():
        return None, "built on a machine without a GPU; FLASHCOMM_CUDA=1 builds CUDA kernels all the same"
    return nvcc, ""


@lru_cache
def present_architectures() -> str:
    """Compute capabilities of this machine's GPUs, "9.0"; empty where there is none or no driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return ";".join(sorted({line for line in lines if re.fullmatch(r"\d+\.\d+", line)}))


def cuda_architectures() -> tuple[list[str], str]:
    """nvcc's -gencode options and the same for people, "sm_80 sm_90 compute_90"."""
    found = os.environ.get("TORCH_CUDA_ARCH_LIST") or present_architectures() or "8.0;9.0+PTX"
    targets: list[str] = []
    for word in re.split(r"[;,\s]+", found.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", word)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST={found}: cannot read {word!r}; write it like 8.0;9.0+PTX.")
        number = match[1] + match[2]
        targets += [f"sm_{number}"] + ([f"compute_{number}"] if match[3] else [])
    gencode = [f"-gencode=arch=compute_{t.split('_')[1]},code={t}" for t in targets]
    return gencode, " ".join(targets)


def run(command: list[str]) -> None:
    """Runs a compiler; its own message is the explanation when it fails."""
    print(shlex.join(command), flush=True)
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        raise SystemExit(f"flashcomm_megatron needs a C++17 compiler: {command[0]} was not found.") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"flashcomm_megatron: {command[0]} failed with exit code {error.returncode}.") from None


class Build(build_ext):
    """Objects in parallel, one link."""

    def build_extension(self, ext: Extension) -> None:
        nvcc, without_cuda = find_nvcc()
        gencode, cuda = cuda_architectures() if nvcc else ([], "")
        sets = ", ".join(INSTRUCTION_SETS)
        print(f"flashcomm_megatron: CPU codec for {sets}; CUDA for {cuda or 'nothing: ' + without_cuda}", flush=True)
        say = f'-DFLASHCOMM_CUDA_ARCHS="{cuda}"' if nvcc else f'-DFLASHCOMM_WITHOUT_CUDA="{without_cuda}"'
        jobs = self.cpu_jobs(say)
        if nvcc:
            kernels = [nvcc, *CUDA, "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode]
            cuda_jobs = {
                f"{Path(name).stem}_{dtype}_{uniform}": [
                    *kernels,
                    f"-DFLASHCOMM_PART_TYPE={dtype}",  # no comma in a value: nvcc would split it
                    f"-DFLASHCOMM_PART_UNIFORM={uniform}",
                    str(CSRC / name),
                ]
                for name in CUDA_IN_PARTS
                for dtype, uniform in PARTS
            }
            cuda_jobs |= {Path(name).stem: [*kernels, str(CSRC / name)] for name in CUDA_SOURCES}
            jobs = cuda_jobs | jobs
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{name}.o") for name in jobs]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job, out: run([*CACHE, *job, "-c", "-o", out]), jobs.values(), objects))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        if nvcc:  # knows where its runtime lies
            run([nvcc, "-shared", "-cudart=static", "-Xcompiler=-pthread", *objects, "-o", str(library)])
        else:
            self.compiler.link_shared_object(objects, str(library), extra_postargs=["-pthread"], target_lang="c++")

    def effort(self, instruction_set: str) -> list[str]:
        """How far the compiler optimizes the codec.

        g++ takes up to three times as long for -O3 as for -O2 with -O3's model of what vectorizing costs, for the same
        speed (docs/log.md). The baseline of x86 is for machines of before 2013.
        """
        compiler = self.compiler.compiler_cxx[0]
        try:
            is_clang = b"clang" in subprocess.run([compiler, "--version"], stdout=subprocess.PIPE).stdout
        except FileNotFoundError:
            raise SystemExit(f"flashcomm_megatron needs a C++17 compiler: {compiler} was not found.") from None
        if instruction_set == "baseline" and len(INSTRUCTION_SETS) > 1:
            return ["-O2"]
        if is_clang:
            return ["-O3"]
        return ["-O2", "-fvect-cost-model=dynamic", "-fpeel-loops"]

    def cpu_jobs(self, say: str) -> dict[str, list[str]]:
        """{object: the compiler's command without -c -o}; ``say`` tells the bindings what CUDA there is."""
        compiler = [*self.compiler.compiler_so_cxx, *COMMON]
        if os.environ.get("FLASHCOMM_WERROR") == "1":
            compiler += ["-Wall", "-Wextra", "-Werror"]
        includes = [f"-isystem{path}" for path in [*self.compiler.include_dirs, pybind11.get_include()]]
        jobs = {
            "bindings": [*compiler, *includes, "-O1", say, str(CSRC / "bindings.cpp")],
            **{Path(name).stem: [*compiler, str(CSRC / name)] for name in HOST_SOURCES},
        }
        if "CUDA_ARCHS" in say:
            jobs["bindings_cuda"] = [*compiler, *includes, "-O1", str(CSRC / "bindings_cuda.cpp")]
        for name, flags in INSTRUCTION_SETS.items():
            for source in CPU_SOURCES:
                command = [
                    *compiler,
                    *self.effort(name),
                    *CODEC,
                    *flags,
                    f"-DFLASHCOMM_ISA={name}",
                    str(CSRC / source),
                ]
                jobs[f"{Path(source).stem}_{name}"] = command
        return jobs


sources = sorted(map(str, CSRC.rglob("*.c*")))
setup(
    ext_modules=[Extension("flashcomm_megatron._C", sources, depends=sorted(map(str, CSRC.rglob("*.h"))))],
    cmdclass={"build_ext": Build},
)
