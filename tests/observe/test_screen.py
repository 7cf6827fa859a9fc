"""Every line is shown once, whatever the program has set up for its own."""

from __future__ import annotations

import logging
import sys

import pytest

from flashcomm_megatron.observe.screen import logger


class Megatrons(logging.StreamHandler):  # type: ignore[type-arg]
    """As megatron/training/log_handler.py: writes to stdout what no blacklisted module says."""

    def __init__(self, blacklisted: str = "torch") -> None:
        super().__init__(stream=sys.stdout)
        self.blacklisted = blacklisted

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.name.startswith(self.blacklisted)


@pytest.mark.parametrize(
    "make", [lambda: None, lambda: logging.StreamHandler(sys.stderr), Megatrons, lambda: Megatrons("flashcomm")]
)
def test_a_line_is_shown_once(make: object, capsys: pytest.CaptureFixture[str]) -> None:
    root, handler = logging.getLogger(), make()  # type: ignore[operator]
    if handler is not None:
        root.addHandler(handler)
    try:
        logger.info("a line of ours")
        logger.warning("a warning of ours")
    finally:
        root.removeHandler(handler)
    shown = "".join(capsys.readouterr())
    assert shown.count("a line of ours") == shown.count("a warning of ours") == 1
