"""The C++ sources under address, undefined-behaviour and thread sanitizers: a short run of `make fuzz`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import sanitized

pytestmark = pytest.mark.skipif(sanitized.compiler() is None, reason="no C++ compiler")


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
