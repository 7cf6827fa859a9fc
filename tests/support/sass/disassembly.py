"""Machine code as text: compiles a CUDA source for one architecture and reads what cuobjdump prints."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ["-Icsrc", "-std=c++17", "-O3", "-fmad=false", "-DFLASHCOMM_ISA=cuda"]
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\*")
GUARDED = re.compile(r"@(!?)(U?)P(\d|T)\s+(.*)")


def cuobjdump() -> str | None:
    """The disassembler: on PATH, else of the toolkit or a Python package, which needs nvdisasm beside it; or None."""
    beside = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    for package, folders in {"nvidia": ("cu13/bin", "cuda_cuobjdump/bin"), "triton": ("backends/nvidia/bin",)}.items():
        spec = importlib.util.find_spec(package)
        beside += [
            Path(place) / folder for place in (spec and spec.submodule_search_locations) or () for folder in folders
        ]
    found = [folder for folder in beside if all((folder / each).exists() for each in ("cuobjdump", "nvdisasm"))]
    return shutil.which("cuobjdump") or next((str(folder / "cuobjdump") for folder in found), None)


def missing() -> str:
    """Why nothing can be compiled and disassembled here; empty where it can."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    return "" if cuobjdump() else "no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"


@dataclass(frozen=True)
class Instruction:
    """One line: ``@!P0 IADD3.X R1, P2, R3, -R4, RZ, P5`` at its address."""

    address: int
    text: str
    op: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str  # "P0", "UP3" or ""
    negated: bool  # runs where the guard is false

    @staticmethod
    def parse(address: int, text: str) -> Instruction:
        """From the text that cuobjdump prints behind the address."""
        guarded, guard, negated, rest = GUARDED.match(text), "", False, text
        if guarded:
            guard, negated, rest = f"{guarded[2]}P{guarded[3]}", guarded[1] == "!", guarded[4]
        name, _, operands = rest.replace(".reuse", "").partition(" ")
        op, *modifiers = name.split(".")
        parts = tuple(part.strip() for part in operands.split(",")) if operands.strip() else ()
        return Instruction(address, text, op, tuple(modifiers), parts, guard, negated)


Program = dict[int, Instruction]  # by address


def compile_cubin(source: Path, architecture: str, target: Path, *defines: str, root: Path = ROOT) -> None:
    """Compiles one .cu of the checkout ``root``, as setup.py does, for ``sm_90`` or another architecture alone."""
    command = ["nvcc", *FLAGS, *defines, f"-arch={architecture}", "-cubin", str(source), "-o", str(target)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source}:\n{done.stderr[-4000:]}")


def read(cubin: Path) -> dict[str, Program]:
    """Every kernel of a cubin, by its symbol."""
    disassembler = cuobjdump()
    assert disassembler, missing()
    text = subprocess.run([disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    programs: dict[str, Program] = {}
    program: Program = {}
    for line in text.splitlines():
        if "Function :" in line:
            program = programs.setdefault(line.split(":")[1].strip(), {})
        elif found := LINE.match(line):
            program[int(found[1], 16)] = Instruction.parse(int(found[1], 16), found[2])
    return programs
