"""A bounded run of long_training.py: a run that stops and goes on ends with the weights of one that did not stop."""

from __future__ import annotations

from importlib.util import find_spec

import long_training
import pytest

STEPS = 120
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
]


def test_a_resumed_run_has_the_weights_of_one_that_went_through() -> None:
    found = long_training.compare(STEPS)
    assert found["quantized"] >= 2 * STEPS, "activations and gradients were compressed"
    assert found["of the last"] < 0.9 * found["loss of the first tenth"]
