"""Importing the package is cheap and touches nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from patience import patient

ROOT = Path(__file__).resolve().parents[2]


def test_importing_the_package_imports_neither_megatron_nor_wandb() -> None:
    source = (
        "import sys, torch; before = set(sys.modules); import flashcomm_megatron\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", source]
    new = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patient(180)).stdout
    assert "flashcomm_megatron" in new
    assert not any(f"'{name}'" in new for name in ("megatron", "wandb", "matplotlib", "transformer_engine")), new


# ---- types ----------------------------------------------------------------------------------------------------------
