"""A checkout of Megatron-LM, where there is one, and how a test runs its scripts without a GPU.

FLASHCOMM_MEGATRON_LM names the checkout; without it ../Megatron-LM beside the repository. Tests are skipped where it is
absent, and where a package that Megatron-LM itself requires is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import patient

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import try_scripts  # noqa: E402

REQUIRED = ("six", "regex", "psutil", "transformers", "tensorboard")


def checkout() -> Path:
    """The checkout's folder; skips the test without one."""
    folder = Path(os.environ.get("FLASHCOMM_MEGATRON_LM") or ROOT.parent / "Megatron-LM").resolve()
    if not (folder / "pretrain_gpt.py").exists():
        pytest.skip(f"no Megatron-LM in {folder}; FLASHCOMM_MEGATRON_LM names another folder")
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"Megatron-LM requires {', '.join(missing)}, not installed")
    return folder


def run(script: str, *options: str, ranks: int = 2, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the checkout, as ``try_scripts`` does."""
    folder = checkout()
    line = try_scripts.command(script, list(options), ranks)
    surroundings = try_scripts.environment(folder) | variables
    return subprocess.run(line, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=patient(200))
