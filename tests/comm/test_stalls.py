"""What the ranks of a group that stands still make of what the others wrote."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from flashcomm_megatron.comm import stalls
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


def test_it_is_believed_at_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, what another rank wrote may be of an earlier standstill: then nobody waits."""
    written, told, calls = {stalls._key(1): json.dumps({"1": "a", FAILED: ERROR})}, [], stalls.Calls()
    store = SimpleNamespace(set=written.__setitem__, get=written.get, check=lambda keys: keys[0] in written)
    comm = SimpleNamespace(calls=calls, rank=0, world=2, ranks=[0, 1], has_failed=False, stop=told.append)
    monkeypatch.setattr(stalls, "_store", lambda comm: store)
    monkeypatch.setattr(messages, "_raised", None)
    calls.note("a")
    calls.note("b")
    found = []
    for _ in range(1 + stalls.LOOKS):  # the first notices that calls were made
        stalls.look(comm)
        found.append(len(told))
    assert found == [0] * stalls.LOOKS + [1] and told[0].startswith("rank 1 has given up before this call")


def test_what_fails_at_the_end_alone_has_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_failed", None)
    messages.fails_at_the_end("a file cannot be written", Config(bits=4, strict=True))
    assert messages.raised() is None
