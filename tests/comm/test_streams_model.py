"""Every interleaving of the streams' protocol, with its rules and without each of them: streams_model.py."""

from __future__ import annotations

import pytest
from streams_model import Rules, explore

SIZES = [(1, 1), (3, 1), (4, 2), (5, 3)]
WRAPPING = [(*each, 4) for each in (*SIZES, (7, 2))]


@pytest.mark.parametrize(("bytes", "capacity", "modulus"), [*((*each, 0) for each in SIZES), *WRAPPING])
def test_all_bytes_arrive_and_nobody_sleeps_for_ever(bytes: int, capacity: int, modulus: int) -> None:
    broken, states = explore(bytes, capacity, Rules(modulus=modulus))
    assert broken is None
    assert states > 20


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        (Rules(look_again=False), "sleeps for ever"),
        (Rules(doorbell_first=False), "sleeps for ever"),
        (Rules(data_first=False), "reads -1 where byte"),
        (Rules(room=False), "overwritten before it was read"),
    ],
    ids=["no second look", "doorbell read late", "counter before data", "no look for room"],
)
def test_without_any_one_rule_the_model_fails(rules: Rules, found: str) -> None:
    broken, _ = explore(5, 2, rules)
    assert broken is not None and found in broken
