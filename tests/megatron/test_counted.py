"""Counters: they change nothing, count tensor-parallel activations that stay exact, and are an error where strict."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashcomm_megatron as fc
from flashcomm_megatron.config import set_current
from flashcomm_megatron.megatron import context, counted, seams


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tensor-parallel group of two, 4 bits in force, nothing counted."""
    parallel_state = pytest.importorskip("megatron.core.parallel_state", reason="megatron-core is not installed")
    group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: group)
    set_current(fc.Config(bits=4))
    fc.reset_stats()
    yield
    set_current(None)
    fc.reset_stats()


def original(input_: Tensor, group: Any = None) -> Tensor:
    return input_


def test_a_counter_counts_and_calls_the_original() -> None:
    x = torch.ones(8)
    count = counted.counter("DSA indexer", "all_gather")(original)
    assert count(x) is x and count(input_=x) is x
    assert fc.stats()["deferred"] == {"DSA indexer": 2} and fc.stats()["exact_bytes"] == 2 * x.nbytes


def test_nothing_is_counted_off_on_one_rank_or_elsewhere() -> None:
    x = torch.ones(8)
    counted.counter("a", "all_gather", "column")(original)(x)
    counted.counter("b", "all_gather")(original)(x, group=SimpleNamespace(size=lambda: 1))
    set_current(None)
    counted.counter("c", "all_gather")(original)(x)
    assert fc.stats()["deferred"] == {}


def test_at_a_site_of_its_kind_a_gathered_output_is_counted() -> None:
    count = counted.counter("gathered output of a column layer", "all_gather", "column")(original)
    with context.at(context.Site("column", nn.Linear(1, 1), fc.Config(bits=4))):
        count(torch.ones(8))
    assert fc.stats()["deferred"] == {"gathered output of a column layer": 1}


def test_strict_makes_an_error_of_it() -> None:
    set_current(fc.Config(bits=4, strict=True))
    with pytest.raises(RuntimeError, match="stays exact: DSA indexer"):
        counted.counter("DSA indexer", "all_gather")(original)(torch.ones(8))


def test_every_counter_stands_in_the_coverage_page(root: Any) -> None:
    page = (root / "docs" / "coverage.md").read_text()
    for seam in seams.COUNTED:
        reasons = [cell.cell_contents for cell in seam.replace.__closure__ or ()]  # type: ignore[attr-defined]
        reason = next(each for each in reasons if isinstance(each, str) and " " in each and each != "all_gather")
        assert f"`{reason}`" in page, reason
