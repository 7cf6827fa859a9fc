"""Build, test and measure on a CUDA machine by one command, so that what was found is on disk from the first minute.

run as:  make gpu-check OUT=folder         or  python benchmarks/gpu_check.py --out folder [--minutes 14] [STAGE ...]

Needs Python 3.10 or newer with torch 2.6 or newer, pybind11, setuptools and pytest, a GPU, and nvcc; downloads
nothing and installs nothing: the extension is built in place, for this machine's GPU alone.

Stages run in the order of what is most worth knowing, each in processes of its own with a deadline of its own; those
of one line of STAGES that time nothing run side by side. Every row that a stage writes is in gpu_check.json at once, so
that whatever breaks, hangs or is killed later, what was measured before is kept. A stage that is late gets SIGINT, and
5 seconds later SIGKILL. FOLDER/NAME.txt has what it printed. Ends with 1 if the build or another stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GRACE = 5.0  # seconds between SIGINT and SIGKILL
BENCH = [sys.executable, "benchmarks/bench_cuda.py"]
PYTEST = [sys.executable, "-m", "pytest", "-v", "-ra", "--noconftest", "-c", os.devnull, "--rootdir", str(ROOT)]
PYTEST += ["-o", f"pythonpath={ROOT / 'tests' / 'support'} {ROOT / 'benchmarks'}", "-p", "gpu_check_tests"]
CODEC, COLLECTIVES, PROCESSES, FAULTS = (
    f"tests/gpu/test_cuda_{name}.py" for name in ("codec", "collectives", "processes", "faults")
)
ALONE = "leaks_nothing or two_to_the_31"  # compare the memory of the whole device
SANITIZED = "memory_checker"


class Stage(NamedTuple):
    """A command that writes rows; ``on_torch``: it shows something without the extension's CUDA kernels too."""

    name: str
    command: list[str]
    seconds: int
    on_torch: bool = False


def tests(*names: str, but: str = f"{ALONE} or {SANITIZED}") -> list[str]:
    """pytest on some files, or on what an expression chooses of them."""
    return [*PYTEST, *(names if "-k" in names else ("-k", f"not ({but})", *names))]


BUILD = Stage("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"], 240)
STAGES = [
    [Stage("smoke", [*BENCH, "smoke"], 60)],
    [Stage("speed", [*BENCH, "codec"], 60)],
    [Stage("fused", [*BENCH, "fused_once"], 60)],
    [Stage("host link", [*BENCH, "all_reduce_host"], 60)],
    [Stage("nccl", [sys.executable, "benchmarks/nccl_ranks.py"], 120, True), Stage("demo", [
        sys.executable, "examples/demo.py", "--gpu"], 120, True)],
    [Stage("graphs", tests("-k", "graph or captured or replay", COLLECTIVES, PROCESSES), 60)],
    [Stage("torch.compile", [*BENCH, "codec_compiled"], 60, True)],
    [Stage("latency", [*BENCH, "latency", "all_reduce_eight", "symmetric_memory", "deepspeed"], 60)],
    [Stage("strange data", tests(CODEC, "tests/observe/test_metrics.py"), 120),
     Stage("collectives", tests(COLLECTIVES, but=f"fifty_thousand or {SANITIZED}"), 120),
     Stage("processes", tests(PROCESSES), 120), Stage("faults", tests(FAULTS), 120)],
    [Stage("memory", tests("-k", ALONE, CODEC, PROCESSES), 60)],
    [Stage("soak", tests("-k", "fifty_thousand", COLLECTIVES), 90)],
    [Stage("sanitizers", tests("-k", SANITIZED, COLLECTIVES), 120)],
]  # fmt: skip


class Running:
    """A stage at work, and the rows it has written."""

    def __init__(self, stage: Stage, out: Path, ends: float, folder: Path = ROOT) -> None:
        self.stage, self.started = stage, time.monotonic()
        self.ends = min(self.started + stage.seconds, ends)
        self._rows, self._text = out / f"{stage.name}.rows", out / f"{stage.name}.txt"
        self._rows.write_text("")
        self._interrupted = 0.0
        with self._text.open("w") as output:
            self._process = subprocess.Popen(
                stage.command, cwd=folder, env=environment(self._rows), stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def rows(self) -> list[Any]:
        """The rows so far; a last line that was cut off is left out."""
        lines = self._rows.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines if line]

    def is_over(self) -> bool:
        """Whether it has ended; late, it is interrupted, then killed."""
        now, over = time.monotonic(), self._process.poll() is not None
        if not over and now > self.ends and not self._interrupted:
            self._interrupted = now
            self._signal(signal.SIGINT)
        elif self._interrupted and now > self._interrupted + GRACE and not over:
            self._signal(signal.SIGKILL)
        if over:
            self._signal(signal.SIGKILL)  # what it started and left
        return over

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def report(self) -> dict[str, Any]:
        """What the JSON says of it."""
        code, rows = self._process.poll(), self.rows()
        if self._interrupted:
            ended = f"stopped at its deadline of {self.ends - self.started:.0f} s"
        elif code is None:
            ended = "running"
        else:
            ended = "passed" if code == 0 else f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        lines = [line for line in self._text.read_text(errors="replace").splitlines() if line.strip()]
        seconds = round(time.monotonic() - self.started, 1)
        return {"ended": ended, "seconds": seconds, "rows": rows, "said": lines[-1][:300] if lines else ""}


def main() -> int:
    options = parse()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    missing = preflight()
    if missing:
        print(f"gpu-check: {missing}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"machine": machine(), "stages": {}, "measured": {}}
    save(report, out)
    run([BUILD], out, ends, report, build_tree(out))
    shutil.rmtree(out / "build")
    built = report["stages"]["build"]["ended"] == "passed"
    for batch in STAGES:
        wanted = [stage for stage in batch if not options.stages or stage.name in options.stages]
        for stage in [] if built else [stage for stage in wanted if not stage.on_torch]:
            report["stages"][stage.name] = {"ended": "left out: the build failed", "rows": []}
        run([stage for stage in wanted if built or stage.on_torch], out, ends, report)
    for name, stage in report["stages"].items():
        print(f"{name}: {stage['ended']}, {len(stage['rows'])} rows, {stage.get('seconds', 0)} s", flush=True)
    print(f"written to {out}")
    return 0 if all(stage["ended"] == "passed" for stage in report["stages"].values()) else 1


def run(batch: list[Stage], out: Path, ends: float, report: dict[str, Any], folder: Path = ROOT) -> None:
    """Run stages side by side; every row is saved as it comes."""
    if batch and ends - time.monotonic() < GRACE:
        report["stages"] |= {stage.name: {"ended": "left out: no time left", "rows": []} for stage in batch}
        batch = []
    running, seen = [Running(stage, out, ends - GRACE, folder) for stage in batch], -1
    while batch:
        over = [each.is_over() for each in running]
        rows = sum(len(each.rows()) for each in running)
        if rows != seen or all(over):
            seen = rows
            for each in running:
                report["stages"][each.stage.name] = each.report()
            save(report, out)
        if all(over):
            break
        time.sleep(0.1)
    save(report, out)


def save(report: dict[str, Any], out: Path) -> None:
    """gpu_check.json, whole at every moment; its "measured" has rows by their section, which the planner reads."""
    report["measured"] = {}
    for stage in report["stages"].values():
        for row in stage["rows"]:
            section = row.get("section")
            if section:
                report["measured"].setdefault(section, []).append({k: v for k, v in row.items() if k != "section"})
    (out / "gpu_check.new").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu_check.new").replace(out / "gpu_check.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder for JSON and texts")
    parser.add_argument("--minutes", type=float, default=14, help="of all stages together")
    parser.add_argument("stages", nargs="*", help="names; by default all")
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


def environment(rows: Path) -> dict[str, str]:
    """Of a stage: nothing is buffered, and no inherited list makes the build compile for other GPUs than this one."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ours = {"FLASHCOMM_CUDA": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    found = {**os.environ, **ours, "FLASHCOMM_CHECK_ROWS": str(rows)}
    found.pop("TORCH_CUDA_ARCH_LIST", None)
    return found


def build_tree(out: Path) -> Path:
    """The build's folder: what setup.py needs, without pyproject.toml, whose fields old setuptools do not know."""
    tree = out / "build"
    tree.mkdir(exist_ok=True)
    for name in ("setup.py", "csrc", "flashcomm_megatron"):
        (tree / name).unlink(missing_ok=True)
        (tree / name).symlink_to(ROOT / name)
    return tree


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
