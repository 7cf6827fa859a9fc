"""Strict holds by every way out of a process: the exit codes of scripts that end with nothing compressed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from patience import patient

ROOT = Path(__file__).resolve().parents[2]
EXITS = {  # way out: the script's last lines, and its exit code
    "return": ("", 1),
    "exit 0": ("sys.exit(0)", 1),
    "exit with words": ("sys.exit('words')", 1),
    "exit 3": ("sys.exit(3)", 1),
    "exception": ("raise ValueError", 1),
    "ctrl-c": (
        "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
        -signal.SIGINT,
    ),
    "terminated": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -signal.SIGTERM),
    "terminated, exit 0": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
        1,
    ),
    "os._exit(0)": ("os._exit(0)", 0),  # nobody sees it
}
QUICK = ("return", "exit 0", "terminated, exit 0")
STRICT = """
import os, signal, sys, time
import flashcomm_megatron as fc
from flashcomm_megatron import config
from flashcomm_megatron.megatron import coverage
def start():
    config.set_current(fc.Config(bits=4, strict=True))
    coverage.start('0 names patched')
"""


def run_script(
    folder: Path, source: str, runner: bool = False, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """The script by itself or by the runner; ``fresh``: at its end an interpreter that is not one of forks.py."""
    script = folder / "train.py"
    script.write_text(source)
    words = [*(["-m", "flashcomm_megatron"] if runner else []), str(script)]
    if not fresh:
        return forks.python(*words)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=patient(120)
    )


@pytest.mark.parametrize("runner", [True, False], ids=["runner", "import"])
@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way not in QUICK)) for way in EXITS])
def test_strict_fails_by_every_way_out(tmp_path: Path, way: str, runner: bool) -> None:
    ending, code = EXITS[way]
    ran = run_script(
        tmp_path, f"{STRICT}start()\n{ending}\n", runner, way not in QUICK or (way == "return" and not runner)
    )
    assert ran.returncode == (3 if runner and way == "exit 3" else code), ran.stderr
    own = way in ("exception", "ctrl-c", "terminated", "os._exit(0)")
    assert own or "no tensor-parallel layer ran" in ran.stderr


def test_an_error_that_a_script_caught_counts_at_its_end_even_switched_off(tmp_path: Path) -> None:
    caught = "try: messages.unexpected('x', config.current())\nexcept RuntimeError: pass\n"
    source = f"{STRICT}start()\nfrom flashcomm_megatron.observe import messages\n{caught}"
    ran = run_script(tmp_path, f"{source}coverage.stop()\nconfig.set_current(None)\n")
    assert ran.returncode == 1 and "x (--flash-comm-strict)" in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "fork of one that is on", "spawn", "forkserver"])
def test_strict_fails_a_child_of_multiprocessing(tmp_path: Path, method: str) -> None:
    source = f"""{STRICT}
import multiprocessing
def fails():
    start()
    raise ValueError("its own error")
if __name__ == "__main__":
    if {"is on" in method}:
        start()
        coverage.stop()
    for target in (start, fails):
        child = multiprocessing.get_context("{method.split()[0]}").Process(target=target)
        child.start()
        child.join()
        print(child.exitcode)
"""
    ran = run_script(tmp_path, source, fresh=True)
    assert ran.stdout.split()[:2] == ["1", "1"] and ran.returncode == 0, ran.stderr
    assert ran.stderr.count("no tensor-parallel layer ran") >= 1 and "its own error" in ran.stderr


def test_what_a_script_does_at_its_exit_is_done_before_the_verdict(tmp_path: Path) -> None:
    ran = run_script(tmp_path, f"{STRICT}import atexit\natexit.register(print, 'saved')\nstart()\n")
    assert ran.returncode == 1 and ran.stdout.split() == ["saved"]
