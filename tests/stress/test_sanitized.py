"""The C++ sources under compiler warnings and under sanitizers: a short run of `make fuzz` and `make threads`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import sanitized

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sanitized.compiler() is None, reason="no C++ compiler")]
WITHOUT_PYTHON = sorted(path for path in (sanitized.ROOT / "csrc").rglob("*.cpp") if "bindings" not in path.name)


@pytest.mark.parametrize("source", WITHOUT_PYTHON, ids=lambda path: path.name)
def test_compilers_warn_of_nothing(source: Path) -> None:
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-Icsrc", "-DFLASHCOMM_ISA=baseline"]
    command = [sanitized.compiler() or "", *flags, str(source)]
    done = subprocess.run(command, cwd=sanitized.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["codec", "streams"])
def test_no_input_makes_the_sanitizers_speak(target: str, tmp_path: Path) -> None:
    corpus = tmp_path / target
    shutil.copytree(sanitized.CORPUS / target, corpus)
    found = sanitized.fuzz(target, 4.0, seed=0, corpus=corpus)
    assert found["runs"] > found["corpus"] > 10
    assert found["edges"] > {"codec": 1000, "streams": 100}[target], "the fuzzer sees the target"


@pytest.mark.parametrize("name", sanitized.THREADED)
def test_ranks_as_threads_have_no_races_and_leak_nothing(name: str) -> None:
    assert sanitized.threads(name, 25)
