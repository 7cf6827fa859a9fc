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
        if any(_shows(handler, record) for handler in logging.getLogger().handlers):
            return
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        print(self.format(record), file=stream, flush=True)


def _shows(handler: logging.Handler, record: logging.LogRecord) -> bool:
    """Whether a handler writes ``record`` to the console: Python's own, or one made from it as Megatron's is."""
    on_console = getattr(handler, "stream", None) in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return on_console and record.levelno >= handler.level and bool(handler.filter(record))


def install() -> None:
    """Give the logger its handler, once, and level INFO unless the user has chosen one."""
    if not any(isinstance(handler, Screen) for handler in logger.handlers):
        logger.addHandler(Screen())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


install()
