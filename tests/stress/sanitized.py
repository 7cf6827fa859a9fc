"""C++ test programs under the sanitizers: what is compiled how, and running it.

    python tests/stress/sanitized.py fuzz [SECONDS]     coverage-guided fuzzing of codec and streams; the corpus grows
                                                 (0 seconds: drops what adds nothing to it)
    python tests/stress/sanitized.py threads [ROUNDS]   ranks as threads, and the codec's threads, under ThreadSanitizer

Programs are built into build/sanitized and again when a source is newer. Fuzzing is by fuzz/driver.cpp, a small
coverage-guided fuzzer that needs no clang; the corpus lies in tests/stress/fuzz/corpus, a folder for each target.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"
CORPUS = ROOT / "tests" / "stress" / "fuzz" / "corpus"

COMMON = ["-Icsrc", "-std=c++17", "-g", "-pthread", "-ffp-contract=off", "-fno-math-errno"]
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
THREADS = ["-fsanitize=thread"]
BASELINE = ["-DFLASHCOMM_ISA=baseline"]
AVX2 = ["-DFLASHCOMM_ISA=avx2", "-mavx2", "-mfma", "-mf16c"]
CODEC = ["csrc/cpu/codec_cpu.cpp", "csrc/cpu/rotated_cpu.cpp", "csrc/cpu/spike_cpu.cpp"]
STREAMS = ["csrc/cpu/streams.cpp", "csrc/cpu/ring.cpp"]
DRIVER = "tests/stress/fuzz/driver.cpp"

# name: (sources, flags). The driver watches the others, not itself.
PROGRAMS: dict[str, tuple[list[str], list[str]]] = {
    "codec": (["tests/stress/fuzz/codec.cpp", *CODEC, DRIVER], ["-O1", *MEMORY, *BASELINE]),
    "codec-avx2": (["tests/stress/fuzz/codec.cpp", *CODEC, DRIVER], ["-O1", *MEMORY, *AVX2]),
    "streams": (["tests/stress/fuzz/streams.cpp", *STREAMS, DRIVER], ["-O1", *MEMORY]),
    "streams-races": (["tests/stress/streams_threads.cpp", *STREAMS], ["-O1", *THREADS]),
    "streams-leaks": (["tests/stress/streams_threads.cpp", *STREAMS], ["-O1", *MEMORY]),
    "codec-races": (
        ["tests/stress/codec_races.cpp", "csrc/cpu/codec_threads.cpp", *CODEC],
        ["-O1", *THREADS, *BASELINE],
    ),
}
TARGETS = ("codec", "codec-avx2", "streams")
THREADED = ("streams-races", "streams-leaks", "codec-races")


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++").split()[0])


def is_possible(name: str) -> bool:
    """Whether this machine can run ``name``."""
    return compiler() is not None and (name != "codec-avx2" or platform.machine() in ("x86_64", "AMD64"))


def build(name: str) -> Path:
    """The program ``name``, compiled if it is not up to date."""
    sources, flags = PROGRAMS[name]
    program = BUILD / name
    inputs = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / each for each in sources), Path(__file__)]
    if program.exists() and program.stat().st_mtime > max(each.stat().st_mtime for each in inputs):
        return program
    BUILD.mkdir(parents=True, exist_ok=True)
    objects = [_compile(name, source, flags) for source in sources]
    subprocess.run([compiler() or "g++", *flags, "-pthread", *map(str, objects), "-o", str(program)], check=True)
    return program


def _compile(name: str, source: str, flags: list[str]) -> Path:
    built = BUILD / f"{name}-{Path(source).parent.name}-{Path(source).stem}.o"
    watched = ["-fsanitize-coverage=trace-pc"] if source != DRIVER and name in TARGETS else []
    command = [compiler() or "g++", *COMMON, *flags, *watched, "-c", source, "-o", str(built)]
    subprocess.run(command, cwd=ROOT, check=True)
    return built


def fuzz(target: str, seconds: float, seed: int, corpus: Path | None = None) -> dict[str, Any]:
    """Fuzz ``target`` and return runs, edges, corpus, new; RuntimeError with the sanitizer's report if it fell."""
    folder = corpus or CORPUS / target.split("-")[0]
    folder.mkdir(parents=True, exist_ok=True)
    ended = subprocess.run([build(target), folder, str(seconds), str(seed)], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{target}: the input is {folder / '.running'}, after 4 bytes of length.\n{ended.stderr}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def threads(name: str, rounds: int, seed: int = 1) -> str:
    """Run ``name`` of THREADED; RuntimeError with the sanitizer's report if it fell."""
    ended = subprocess.run([build(name), str(rounds), str(seed)], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{name}:\n{ended.stderr}")
    return ended.stdout


def main(words: list[str]) -> int:
    """The command line of the docstring."""
    if words[:1] == ["fuzz"]:
        seconds = float(words[1]) if len(words) > 1 else 3600.0
        for target in filter(is_possible, TARGETS):
            print(target, fuzz(target, seconds / len(TARGETS), seed=os.getpid()), flush=True)
        return 0
    if words[:1] == ["threads"]:
        for name in THREADED:
            print(name, threads(name, int(words[1]) if len(words) > 1 else 1000), flush=True)
        return 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
