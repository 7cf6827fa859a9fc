"""Every mutation of mutations.py still has its place and its tests; a few of them are tried."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mutations
import pytest


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda each: each.invariant)
def test_a_mutation_changes_one_place_and_stays_valid(mutation: mutations.Mutation) -> None:
    path, text = mutations.mutated(mutation, mutations.ROOT)
    assert text != path.read_text()
    if path.suffix == ".py":
        ast.parse(text)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda each: each.invariant)
def test_the_tests_that_a_mutation_names_exist(mutation: mutations.Mutation) -> None:
    file, _, words = mutation.tests.partition(" -k ")
    text = (mutations.ROOT / file).read_text()
    names = re.findall(r"def (test_\w+)", text)
    for word in filter(None, re.split(" or | and ", words)):
        inside = re.split(r"[\[\]-]", word)[0]  # of a test's name, or of one of its parameters
        assert any(inside in name for name in names) or f'"{inside}' in text, f"{file} has no test for -k {words}"


@pytest.mark.slow
@pytest.mark.parametrize("word", ["3 bounded", "5 never touched: integers"])
def test_a_mutation_is_noticed(word: str, tmp_path: Path) -> None:
    [mutation] = [each for each in mutations.MUTATIONS if each.invariant.startswith(word)]
    mutations.copy(tmp_path)
    assert mutations.survives(mutation, tmp_path) == ""
