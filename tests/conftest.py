"""What every test may use: the folder of shared data, the repository's root, and no deadlines in property tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is no failure: hypothesis times no example. The rest of its profile stays (repeatable under CI).
settings.register_profile("untimed", settings.default, deadline=None)
settings.load_profile("untimed")


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
