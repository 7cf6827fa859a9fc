"""What every test may use: the root, shared data, the extension, and deadlines that a busy machine moves."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType

import forks
import pytest
from hypothesis import settings
from patience import patient

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is no failure: hypothesis times no example. The rest of its profile stays (repeatable under CI).
settings.register_profile("untimed", settings.default, deadline=None)
settings.load_profile("untimed")


# Files that take longest, longest first: a file is one worker's, and the last to begin keeps the others waiting.
LONGEST = (
    "faults", "examples", "collectives", "accuracy", "compare", "exit_codes", "shared_memory", "readme", "mixtures",
    "compiled_layers", "train_tiny", "training", "rows", "overflow", "generate", "main", "codec", "streams_model",
    "overlap", "batch_invariant", "compare_wandb", "call_counts", "rows_stand_alone", "last_sum", "feedback", "model",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """The garbage collector leaves alone what was imported, in tests."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)  # a run without pytest-xdist has no workers
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores, at most 4: ranks of a test wait for each other."""
    return min(len(os.sched_getaffinity(0)) + 1, 4)


def pytest_configure(config: pytest.Config) -> None:
    """The processes of a parallel run share servers of forked processes; a run inside a test has its own."""
    if not hasattr(config, "workerinput"):
        os.environ.pop(forks.ADDRESS, None)
        if config.getoption("numprocesses", None):
            os.environ[forks.ADDRESS] = forks.sockets()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """pytest's timeout of this test, in seconds of a quiet machine, becomes one of this machine as it is now."""
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else item.config.getini("timeout"))
    item.add_marker(pytest.mark.timeout(patient(seconds)), append=False)
    return (yield)


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


@pytest.fixture
def native() -> Iterator[ModuleType]:
    """The extension; its instruction set is put back afterwards."""
    _C = pytest.importorskip("flashcomm_megatron._C")
    before = _C.info()["isa"]
    yield _C
    _C.use_isa(before)
