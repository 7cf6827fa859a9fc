"""What the ranks of a group that stands still make of what the others wrote."""

from __future__ import annotations

import pytest

from flashcomm_megatron.comm.stalls import FAILED, has_given_up
from flashcomm_megatron.config import Config
from flashcomm_megatron.observe import messages

ERROR = "flash-comm is on (4-bit) but its options were changed (--flash-comm-strict)"


@pytest.mark.parametrize(
    ("theirs", "mine", "expected"),
    [
        ({"9": "a", FAILED: ERROR}, None, True),
        ({"9": "a", "10": "b", FAILED: ERROR}, None, False),  # it made this call as well
        ({"8": "a", FAILED: ERROR}, None, False),  # written at an earlier standstill
        ({"9": "a", FAILED: None}, None, False),  # it is slower
        ({"9": "a", FAILED: ERROR}, ERROR, False),  # all ranks had it
    ],
)
def test_a_rank_has_given_up_that_failed_instead_of_this_call(
    theirs: dict[str, str], mine: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_raised", mine)
    assert has_given_up(theirs, 10) is expected


def test_what_fails_at_the_end_alone_has_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_failed", None)
    messages.fails_at_the_end("a file cannot be written", Config(bits=4, strict=True))
    assert messages.raised() is None
