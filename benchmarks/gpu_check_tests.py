"""For pytest in a stage of gpu_check.py: a row for each test as it ends, and an end to a test that hangs.

A test that waits for a GPU cannot be interrupted, so the process ends with it; its row says "started" and no more.
"""

from __future__ import annotations

import faulthandler
import json
import os
from typing import Any

SECONDS = float(os.environ.get("FLASHCOMM_CHECK_TEST_SECONDS", "60"))  # of one test


def write(**row: Any) -> None:
    """Append a row."""
    with open(os.environ["FLASHCOMM_CHECK_ROWS"], "a") as rows:
        rows.write(json.dumps(row) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Say which test it is, and start its clock."""
    write(test=nodeid, outcome="started")
    faulthandler.dump_traceback_later(SECONDS, exit=True)


def pytest_runtest_logreport(report: Any) -> None:
    """Say how it ended."""
    if report.when == "call" or report.outcome != "passed":
        write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2))
    if report.when == "teardown":
        faulthandler.cancel_dump_traceback_later()
