"""FP8 is never on by itself; a test hands a layer its quantizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FP8GlobalStateManager:
    """Says that FP8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Whether matrix products run in FP8."""
        return False


@contextmanager
def fp8_autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Does nothing."""
    yield


fp8_model_init = fp8_autocast
