"""A few restarts of restarts.py: none hangs, the next attempt is right, nothing is left behind."""

from __future__ import annotations

import pytest
import restarts
from patience import patient

pytestmark = pytest.mark.slow
RESTARTS = 4  # a rank is killed, and exits, each inside its first call, and once before


@pytest.mark.parametrize("transport", ["host", "group"])
def test_a_job_that_is_restarted_sums_right_and_leaves_nothing(transport: str) -> None:
    found = restarts.run(RESTARTS, transport, 2, seconds=patient(200))
    assert len(found["apart"]) == RESTARTS
    last = found["steps"][-4:]
    assert last == sorted(last) and last[-1] == RESTARTS * 4 + 3, "the last attempt logged all its steps"
