"""The worked blocks of 8 numbers in the formats' docstrings are what the code gives."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from flashcomm_megatron.codec import rotated, spike, uniform
from flashcomm_megatron.codec.published import microscaling, outlier


@pytest.mark.parametrize("module", [uniform, spike, rotated, microscaling, outlier], ids=lambda module: module.__name__)
def test_worked_examples_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0
