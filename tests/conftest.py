"""What every test may use: the folder of shared data, and the repository's root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Models and texts that are not part of the repository: FLASHCOMM_TEST_DATA, else ../shared/data."""
    folder = Path(os.environ.get("FLASHCOMM_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; FLASHCOMM_TEST_DATA names another folder")
    return folder
