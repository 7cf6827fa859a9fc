"""The logger ``flashcomm_megatron``: everything the package says passes through it, so a user can set its level.

    logging.getLogger("flashcomm_megatron").setLevel(logging.WARNING)       no line at start and end

Lines for the user have level INFO, fallbacks and complaints WARNING. A program that has set up logging to its console
gets them there, in its own form. Otherwise INFO goes to stdout and WARNING to stderr, as they are.
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("flashcomm_megatron")


class Screen(logging.Handler):
    """Prints a message by itself, unless the root logger already prints to the console."""

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if any(type(handler) is logging.StreamHandler for handler in root.handlers):
            return
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        print(self.format(record), file=stream, flush=True)


def install() -> None:
    """Give the logger its handler, once, and level INFO unless the user has chosen one."""
    if not any(isinstance(handler, Screen) for handler in logger.handlers):
        logger.addHandler(Screen())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


install()
