"""Which lines the tests run: the package's by coverage.py, those of csrc by gcov.

    python tests/stress/covered.py [--out FILE.json] [--floor PERCENT] [PYTEST'S WORDS ...]

The suite runs in a copy of the repository whose extension is built with --coverage. Processes that tests start count
too, ranks and scripts alike, unless they are killed. Lines of csrc are those that a build without CUDA compiles; a line
compiled for several instruction sets was run if one of them ran it. Ends with an error where the package is below the
floor or a test failed. What was not run is listed by file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from mutations import ROOT, copy

FLOOR = 90.0  # percent of the package's lines
PATIENCE = ["-o", "timeout=1200", "-o", "faulthandler_timeout=1500"]  # seconds: everything is slower here


# A rank ends by os._exit, which skips what gcov does at a process's end: the copy's ranks do it themselves.
WRITER = """
extern "C" void __gcov_dump();
extern "C" __attribute__((visibility("default"))) void write_counts() { __gcov_dump(); }
"""
BEFORE_EXIT = """

import ctypes
from flashcomm_megatron import _C

_exit = os._exit


def _counted_exit(status: int) -> None:
    ctypes.CDLL(_C.__file__).write_counts()
    _exit(status)


os._exit = _counted_exit
"""


class File(NamedTuple):
    """Lines of one source: those that can run, and of these the ones that did not."""

    lines: int
    missing: list[int]


def build(folder: Path) -> None:
    """The extension, in place, without CUDA, counting its lines; ranks that write their counts."""
    writer = folder / "writer.o"
    command = ["g++", "-fPIC", "-x", "c++", "-", "-c", "-o", str(writer)]
    subprocess.run(command, input=WRITER, text=True, check=True)
    flags = {"CFLAGS": "--coverage", "CXXFLAGS": "--coverage", "LDFLAGS": f"--coverage {writer}"}
    variables = {**os.environ, "FLASHCOMM_CUDA": "0", **flags}
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    subprocess.run(command, cwd=folder, env=variables, check=True, stdout=subprocess.DEVNULL)
    with (folder / "tests" / "support" / "ranks.py").open("a") as ranks:
        ranks.write(BEFORE_EXIT)


def test(folder: Path, words: list[str]) -> bool:
    """Run pytest with ``words`` in ``folder`` under coverage.py; whether all passed."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "COVERAGE_FILE": str(folder / ".coverage"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "coverage", "run", "-m", "pytest", "-q", *PATIENCE, *words]
    return subprocess.run(command, cwd=folder, env=variables).returncode == 0


def package(folder: Path) -> dict[str, File]:
    """{file: its lines} of the package."""
    variables = {**os.environ, "COVERAGE_FILE": str(folder / ".coverage")}
    for words in (["combine", "-q"], ["json", "-q", "-o", "coverage.json"]):
        subprocess.run([sys.executable, "-m", "coverage", *words], cwd=folder, env=variables, check=True)
    files = json.loads((folder / "coverage.json").read_text())["files"]
    return {name: File(each["summary"]["num_statements"], each["missing_lines"]) for name, each in files.items()}


def csrc(folder: Path) -> dict[str, File]:
    """{file: its lines} of the C++ sources; counts of all objects that hold a line are added."""
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for notes in (folder / "build").rglob("*.gcno"):
        command = ["gcov", "--json-format", "--stdout", str(notes)]
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
        for line in found.splitlines():
            for file in json.loads(line)["files"]:
                for each in file["lines"]:
                    counts[file["file"]][each["line_number"]] += each["count"]
    return {
        name: File(len(lines), sorted(number for number, count in lines.items() if not count))
        for name, lines in sorted(counts.items())
        if name.startswith("csrc/")
    }


def percent(files: dict[str, File]) -> float:
    """Of all lines, those that ran."""
    lines = sum(each.lines for each in files.values())
    return 100.0 * (1 - sum(len(each.missing) for each in files.values()) / lines)


def summary(files: dict[str, File]) -> dict[str, Any]:
    """For the results: in all, and by file."""
    by_file = {name: [each.lines, len(each.missing)] for name, each in files.items()}
    lines, missing = (sum(column) for column in zip(*by_file.values(), strict=True))
    return {"percent": round(percent(files), 1), "lines": lines, "not run": missing, "by file": by_file}


def main(words: list[str]) -> int:
    """The command line of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--floor", type=float, default=FLOOR)
    asked, pytest = parser.parse_known_args(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(folder)
        build(folder)
        passed = test(folder, pytest)
        parts = {"package": package(folder), "csrc": csrc(folder)}
    for part, files in parts.items():
        for file, each in files.items():
            if each.missing:
                print(f"{percent({file: each}):5.1f} % {file}: {' '.join(map(str, each.missing))}")
        print(f"{percent(files):5.1f} % of {part}")
    if asked.out:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from record import circumstances

        found = {part: summary(files) for part, files in parts.items()}
        asked.out.write_text(json.dumps({"circumstances": circumstances(), **found}, indent=1) + "\n")
    return 0 if passed and percent(parts["package"]) >= asked.floor else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
