"""A bounded run of soak.py: every collective of a random mix is right, and all ranks agree."""

from __future__ import annotations

import pytest
import soak
from ranks import spawn

from flashcomm_megatron.codec import extension

CALLS = 600
pytestmark = pytest.mark.slow


@pytest.mark.skipif(extension.module() is None, reason="the extension is not built")
def test_random_collectives_are_right_on_every_rank() -> None:
    for done in spawn(soak.run, 4, CALLS, 7):
        assert done["checked"] == done["compared"] == done["calls"] >= CALLS
        assert done["exact"] > CALLS / 3 and done["specified"] >= CALLS / soak.SPECIFIED
        mix = [name for name in done if name.startswith(soak.KINDS)]
        assert len(mix) >= 2 * len(soak.KINDS)
