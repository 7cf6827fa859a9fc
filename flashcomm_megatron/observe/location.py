"""Which layer of a model this thread is running: noted by megatron/context.py, read by errors and error samples."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Location(Protocol):
    """A place in a model."""

    @property
    def kind(self) -> str:
        """What kind of layer, for example "row": error samples are kept by it."""

    @property
    def name(self) -> str:
        """The very layer, for errors; finding it may take its time."""


class _Here(threading.local):
    location: Any = None


_here = _Here()


def here() -> Any:
    """The location of this thread, None outside of every layer."""
    return _here.location


@contextmanager
def at(location: Location | None) -> Iterator[None]:
    """Be at ``location`` (None: at none) inside the block, on this thread."""
    outer, _here.location = _here.location, location
    try:
        yield
    finally:
        _here.location = outer
