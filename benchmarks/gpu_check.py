"""Build, test and measure on a CUDA machine by one command; what was found goes to one folder.

run as:  make gpu-check OUT=folder         or  python benchmarks/gpu_check.py --out folder

Needs Python 3.10 or newer with torch 2.6 or newer, pybind11, setuptools and pytest, a GPU, and nvcc; downloads
nothing and installs nothing: the extension is built in place. Takes at most 8 minutes: each stage gets what is left.
Leaves gpu_check.json (machine, versions, commit, what passed, and the measurements of bench_cuda.py) and gpu_check.log.
Ends with 1 if the build or a test failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 460  # of all stages
BENCH_SECONDS = 150  # kept for the last one
BUILD = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-ra", "--noconftest", "-c", os.devnull, "--rootdir", str(ROOT)]
PYTEST += ["-o", f"pythonpath={ROOT / 'tests' / 'support'}"]
BENCH = [sys.executable, "benchmarks/bench_cuda.py", "--out"]
TESTS = {  # "cuda" is in the names of files and of what else needs a GPU
    "tests": [
        "tests/gpu/test_cuda_codec.py",
        "tests/gpu/test_cuda_collectives.py",
        "tests/codec/test_extension.py",
        "tests/observe/test_metrics.py",
    ],
    "tests-processes": ["tests/gpu/test_cuda_processes.py"],
}


def main() -> int:
    options = parse()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + SECONDS
    report: dict[str, Any] = {"machine": machine(), "stages": {}}
    stages = report["stages"]
    with open(out / "gpu_check.log", "w") as log:
        missing = preflight()
        if missing:
            print(f"gpu-check: {missing}", file=sys.stderr)
            return 2
        stages["build"] = finish(start("build", BUILD, out, build_tree(out)), ends - BENCH_SECONDS, log)
        if stages["build"]["passed"]:
            running = {name: start(name, [*PYTEST, "-k", "cuda", *files], out) for name, files in TESTS.items()}
            for name, process in running.items():
                stages[name] = finish(process, ends - BENCH_SECONDS, log)
                stages[name]["passed"] &= " passed" in stages[name]["summary"]  # all skipped is no pass
            stages["bench"] = finish(start("bench", [*BENCH, str(out)], out), ends, log)
        measured = out / "bench_cuda.json"
        report["measured"] = json.loads(measured.read_text()) if measured.exists() else None
        shutil.rmtree(out / "build")
        (out / "gpu_check.json").write_text(json.dumps(report, indent=1))
    for name, stage in stages.items():
        print(f"{name}: {'passed' if stage['passed'] else 'FAILED'}, {stage['seconds']} s, {stage['summary']}")
    print(f"written to {out}")
    return 0 if all(stages[name]["passed"] for name in stages if name != "bench") else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder for JSON and log")
    return parser.parse_args()


def preflight() -> str:
    """What this machine lacks, or nothing."""
    absent = [name for name in ("torch", "pybind11", "setuptools", "pytest") if importlib.util.find_spec(name) is None]
    if absent:
        return f"this Python has no {', '.join(absent)}: use one that has (make gpu-check PYTHON=...)."
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH: install the CUDA toolkit."
    import torch

    return "" if torch.cuda.is_available() else "torch sees no GPU."


def build_tree(out: Path) -> Path:
    """The build's folder: what setup.py needs, without pyproject.toml, whose fields old setuptools do not know."""
    tree = out / "build"
    tree.mkdir(exist_ok=True)
    for name in ("setup.py", "csrc", "flashcomm_megatron"):
        (tree / name).unlink(missing_ok=True)
        (tree / name).symlink_to(ROOT / name)
    return tree


def start(name: str, command: list[str], out: Path, folder: Path = ROOT) -> subprocess.Popen[bytes]:
    """A stage with its output in a file of its own, so that stages may run side by side."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "FLASHCOMM_CUDA": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with open(out / f"{name}.txt", "w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    process.started, process.output = time.monotonic(), out / f"{name}.txt"  # type: ignore[attr-defined]
    return process


def finish(process: Any, ends: float, log: Any) -> dict[str, Any]:
    """Wait until ``ends`` at most, then stop the stage and what it started; its output joins the log."""
    try:
        process.wait(max(1.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
    seconds = round(time.monotonic() - process.started, 1)
    text = process.output.read_text(errors="replace")
    process.output.unlink()
    log.write(f"==== {process.args}\n{text}\n==== exit code {process.returncode} after {seconds} s\n\n")
    log.flush()
    print(text[-3000:], flush=True)
    lines = [line for line in text.splitlines() if line.strip()]
    return {"passed": process.returncode == 0, "seconds": seconds, "summary": lines[-1].strip("= ") if lines else ""}


def machine() -> dict[str, Any]:
    """GPU, versions, commit."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpus": torch.cuda.device_count(),
        "driver": told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1],
        "nvcc": re.findall(r"release ([\d.]+)", told("nvcc", "--version"))[:1],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": told("git", "-C", str(ROOT), "describe", "--always", "--dirty") or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def told(*command: str) -> str:
    """What a command prints, or nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
