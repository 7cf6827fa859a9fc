"""The flag and buffer rules, proved by trying every interleaving, and shown to be needed by taking each away."""

from __future__ import annotations

import pytest
from protocol_model import LEGS, Call, Rules, explore, reached, sequences

KINDS = [Call(kind) for kind in LEGS]
NOBODY_HAS_ANY = frozenset({0, 1, 2})


def test_no_order_of_two_ranks_breaks_any_three_calls_then_the_first_again():
    """Every mix of kinds, among them calls where rank 1, or every rank, has nothing."""
    calls = [*KINDS, Call("two-step", empty=frozenset({1})), Call("reduce_scatter", empty=NOBODY_HAS_ANY)]
    for start in sequences(calls, 3):
        sequence = (*start, start[0])
        problem, _ = explore(2, sequence)
        assert problem is None, (sequence, problem)


def test_no_order_of_three_ranks_breaks_any_three_calls():
    calls = [*KINDS, Call("two-step", empty=frozenset({1, 2}))]
    for sequence in sequences(calls, 3):
        problem, _ = explore(3, sequence)
        assert problem is None, (sequence, problem)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_peers_may_be_taken_in_any_order(order):
    problem, states = explore(3, [Call("reduce_scatter"), Call("all_gather"), Call("two-step")], order=order)
    assert problem is None
    assert states > 500, "the search must not be trivial"


def test_rounds_inside_one_call_do_not_mix():
    """A larger message takes several rounds of one kernel, of which the next is sent before this one has been read."""
    for kind in LEGS:
        assert explore(3, [Call(kind, rounds=3), Call("reduce_scatter", rounds=2)])[0] is None


def test_no_order_of_two_ranks_breaks_calls_of_several_rounds():
    """After each other, whatever region of the ring a call begins with."""
    calls = [Call(kind, rounds=rounds) for kind in LEGS for rounds in (1, 3)]
    calls += [Call("two-step", rounds=2, empty=frozenset({1})), Call("one-step", rounds=2, empty=NOBODY_HAS_ANY)]
    for sequence in sequences(calls, 3):
        problem, _ = explore(2, sequence)
        assert problem is None, (sequence, problem)


def test_grids_may_differ_between_calls():
    """Two blocks, then one, then two: a block that sat out a call must not be confused by its old flags."""
    for first in ("two-step", "reduce_scatter"):
        for second in ("all_gather", "reduce_scatter"):
            calls = [Call(first, blocks=2), Call(second), Call(first, blocks=2)]
            assert explore(2, calls)[0] is None


def test_the_model_holds_when_the_call_counter_wraps():
    """With flags modulo 8 the counter wraps in the middle of the sequence."""
    calls = [Call("reduce_scatter"), Call("two-step"), Call("all_gather"), Call("reduce_scatter"), Call("two-step")]
    for first in range(4, 12):
        assert explore(2, calls, Rules(modulus=8), first)[0] is None


def test_reached_is_an_order_around_the_wrap():
    for modulus in (8, 2**64):
        for wanted in (1, modulus // 2, modulus - 1, modulus, modulus + 1):
            assert reached(wanted % modulus, wanted % modulus, modulus)
            assert reached((wanted + 2) % modulus, wanted % modulus, modulus)
            assert not reached((wanted - 1) % modulus, wanted % modulus, modulus)


# ---- negative controls: each rule taken away breaks something -------------------------------------------------


@pytest.mark.parametrize("kind", LEGS)
def test_with_three_regions_unread_data_is_overwritten(kind):
    assert "overwrites" in (explore(2, [Call(kind, rounds=4)], Rules(regions=3))[0] or "")


def test_who_does_not_work_ahead_needs_two_regions():
    """Then one is what a flag from everybody protects; with one alone a fast rank overwrites what a slow one reads."""
    calls = [Call("reduce_scatter", rounds=2), Call("all_gather"), Call("two-step", rounds=2), Call("one-step")]
    assert explore(2, calls, Rules(regions=2, ahead=False))[0] is None
    for kind in ("reduce_scatter", "all_gather"):
        assert "overwrites" in (explore(2, [Call(kind), Call(kind)], Rules(regions=1, ahead=False))[0] or "")


def test_two_regions_a_leg_let_two_steps_alone_work_ahead():
    """The rule before the ring. In two steps every rank answers between two pushes of a leg; in one nobody does, so
    the third push meets a rank that reads the first."""
    assert explore(2, [Call("two-step", rounds=4)], Rules(halves=True))[0] is None
    for kind in LEGS.keys() - {"two-step"}:
        found = explore(2, [Call(kind, rounds=3)], Rules(halves=True))[0]
        assert found == "rank 1 exchange 3: overwrites what rank 0 has not read", kind


def test_with_equality_a_fast_peer_is_missed():
    assert "deadlock" in (explore(2, [Call("reduce_scatter")] * 2, Rules(compare="equal"))[0] or "")


def test_without_flags_for_empty_segments_unread_data_is_overwritten():
    calls = [Call("reduce_scatter"), *[Call("reduce_scatter", empty=NOBODY_HAS_ANY)] * 3, Call("reduce_scatter")]
    assert explore(3, calls)[0] is None
    assert "overwrites" in (explore(3, calls, Rules(announce_empty=False))[0] or "")


def test_two_streams_break_the_argument():
    assert (
        explore(2, [Call("reduce_scatter", blocks=2), Call("two-step")] * 2, Rules(stream_order=False))[0] is not None
    )


def test_narrow_flags_go_stale_on_blocks_that_idle():
    """Why flags have 64 bits: a block that sits out half a turn of calls finds its old flag in the future."""
    calls = [Call("all_gather", blocks=2), *[Call("all_gather")] * 4, Call("all_gather", blocks=2)]
    assert explore(2, calls)[0] is None
    assert "has not pushed" in (explore(2, calls, Rules(modulus=8))[0] or "")
