"""Cycles of the plain codec's inner loops on processors that are not at hand, by llvm-mca's models of their ports.

run as:  python benchmarks/bench_ports.py [--mca llvm-mca-19]     (LLVM 16 or newer, g++ and objdump; a minute)

A model knows how many operations a processor starts on which port in a cycle, not its clock, caches and memory, nor the
waits between stages: a bound, to compare loops and processors by. Each stage of encoding and decoding bfloat16 at 4
bits in blocks of 64 is compiled by itself with setup.py's options. Writes results/ports.json: cycles for 64 values, and
the port that is busiest. ``icelake-server`` has one unit for 512-bit arithmetic in LLVM's model; most Xeons have two.
"""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
import setuptools

ROOT = Path(__file__).parents[1]
PROCESSORS = ["skylake-avx512", "icelake-server", "sapphirerapids", "znver4"]
EFFORT = ["-O2", "-fvect-cost-model=dynamic", "-fpeel-loops"]  # setup.py's for g++
PASSES = 100
# {stage: its call, values of one pass of its loop with AVX-512 and with AVX2}
STAGES = {
    "encode: extremes": ("extremes<T, 64>(x, n, low, high)", 512, 512),
    "encode: fit": ("fit<T>(low, high, n, 15.0f, minima, scales, metadata, strange)", 1024, 512),
    "encode: quantize and pack": ("quantize_and_pack<T, 64>(x, minima, scales, 64 * n, plane)", 128, 64),
    "decode: unpack": ("unpack_plane(4, plane, 64 * n, 0, codes)", 128, 64),
    "decode: multiply, add, round": ("accumulate<T, 64, true, true>(codes, minima, scales, n, sums, x)", 64, 64),
}
DRIVER = """#include "cpu/codec_cpu.cpp"
namespace flashcomm::FLASHCOMM_ISA {
using T = BFloat16;
__attribute__((flatten)) void stage(
    uint16_t* __restrict x, int n, uint32_t* __restrict low, uint32_t* __restrict high, float* __restrict minima,
    float* __restrict scales, uint32_t* __restrict metadata, uint32_t* __restrict strange, uint8_t* __restrict plane,
    uint8_t* __restrict codes, float* __restrict sums) { CALL; }
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mca", default="llvm-mca", help="the program llvm-mca")
    mca = parser.parse_args().mca
    setuptools.setup = lambda **_: None  # setup.py is read, not run
    setup = runpy.run_path(str(ROOT / "setup.py"))
    rows = [row for isa in ("avx512", "avx2") for row in measure(isa, setup, mca)]
    record.save("ports", rows)


def measure(isa: str, setup: dict[str, Any], mca: str) -> Iterator[dict[str, Any]]:
    """A row for every stage and processor: cycles for 64 values."""
    flags = [*setup["COMMON"], *EFFORT, *setup["CODEC"], *setup["INSTRUCTION_SETS"][isa], f"-DFLASHCOMM_ISA={isa}"]
    for stage, (call, *values) in STAGES.items():
        loop = widest_loop(disassembled(DRIVER.replace("CALL", call), flags))
        for processor in PROCESSORS:
            cycles, port = modelled(loop, processor, mca)
            per_64 = cycles * 64 / values[isa == "avx2"]
            print(f"{isa:7} {stage:30} {processor:15} {per_64:5.1f} cycles for 64 values, most on {port}", flush=True)
            yield {"isa": isa, "stage": stage, "processor": processor, "cycles": round(per_64, 2), "busiest": port}


def disassembled(source: str, flags: list[str]) -> list[tuple[int, str]]:
    """(address, instruction) of the function ``stage`` and what it calls, as objdump writes them."""
    with tempfile.TemporaryDirectory() as folder:
        cpp, obj = Path(folder, "stage.cpp"), Path(folder, "stage.o")
        cpp.write_text(source)
        subprocess.run(["g++", *flags, "-w", str(cpp), "-c", "-o", str(obj)], cwd=ROOT, check=True)
        command = ["objdump", "-d", "--no-show-raw-insn", str(obj)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    start = re.search(r"^[0-9a-f]+ <\w*5stage\w*>:$", text, re.MULTILINE)
    assert start, "no function stage"
    body = text[start.end() :].split("\n\n")[0]
    return [(int(m[1], 16), m[2].strip()) for m in re.finditer(r"^\s*([0-9a-f]+):\t([^#<\n]*)", body, re.MULTILINE)]


def widest_loop(body: list[tuple[int, str]]) -> list[str]:
    """The loop without a loop inside that has most instructions on the widest registers."""
    index = {address: i for i, (address, _) in enumerate(body)}
    jumps = [(i, re.fullmatch(r"j\w+\s+([0-9a-f]+)", text)) for i, (_, text) in enumerate(body)]
    loops = [(index[int(to[1], 16)], i) for i, to in jumps if to and index.get(int(to[1], 16), i + 1) <= i]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    texts = [[text for _, text in body[first : last + 1]] for first, last in inner]
    return max(texts, key=lambda loop: [sum(r in text for text in loop) for r in ("%zmm", "%ymm")])


def modelled(loop: list[str], processor: str, mca: str) -> tuple[float, str]:
    """Cycles of one pass, and the resource that is busiest."""
    lines = [re.sub(r"^(j\w+\s+)[0-9a-f]+", r"\1.Lloop", text.replace("{evex} ", "")) for text in loop]
    command = [mca, f"-mcpu={processor}", f"-iterations={PASSES}"]
    source = ".Lloop:\n" + "\n".join(lines) + "\n"
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    cycles = int(re.search(r"Total Cycles:\s+(\d+)", text)[1]) / PASSES  # type: ignore[index]
    ports = dict(re.findall(r"^\[([\d.]+)\]\s+- (\S+)", text, re.MULTILINE))
    pressure = text.split("Resource pressure per iteration:\n")[1].splitlines()
    shares = zip(re.findall(r"\[([\d.]+)\]", pressure[0]), pressure[1].split(), strict=True)
    return cycles, ports[max((float(share), key) for key, share in shares if share != "-")[1]]


if __name__ == "__main__":
    main()
