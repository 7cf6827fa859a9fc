"""The patch engine, on a stub package that reproduces Megatron's layering; Megatron itself is not needed.

``mappings`` defines a collective, ``layers`` and ``moe`` import it by name, and every original raises when it is
called, so a call that was not redirected cannot pass for one that was.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashcomm_megatron.megatron import patching
from flashcomm_megatron.megatron.patching import PatchError, Seam

MAPPINGS = """
def reduce(input_, group=None):
    raise AssertionError("original reduce called")
"""
LAYERS = """
from .mappings import reduce

class Row:
    def forward(self, input_):
        return reduce(input_, group="tp")

class Linear:
    @staticmethod
    def forward(ctx, input):
        raise AssertionError("original Linear.forward called")

class Child(Row):
    pass

length = len
"""
MOE = "from .mappings import reduce\n"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a fresh package with the modules mappings, layers and moe; unpatched and forgotten afterwards."""
    name = "stub_megatron"
    (tmp_path / name).mkdir()
    for module, source in {"__init__": "", "mappings": MAPPINGS, "layers": LAYERS, "moe": MOE}.items():
        (tmp_path / name / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    applied = dict(patching._applied)
    yield name
    patching._applied.clear()
    patching._applied.update(applied)
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def ours(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return ("ours", original, *args)

    return replacement


def seam(stub: str, name: str, *params: str, module: str = "layers") -> Seam:
    return Seam(f"{stub}.{module}", name, params, ours, "a test")


def table(stub: str) -> list[Seam]:
    return [seam(stub, "reduce", "input_", "group"), seam(stub, "Linear.forward", "ctx", "input")]


def layers(stub: str) -> ModuleType:
    return importlib.import_module(f"{stub}.layers")


def test_callers_reach_the_replacement_and_other_bindings_stay(stub: str) -> None:
    moe = importlib.import_module(f"{stub}.moe")
    original = moe.reduce
    patching.apply(table(stub))
    assert layers(stub).Row().forward(1) == ("ours", original, 1)
    assert moe.reduce is original
    with pytest.raises(AssertionError, match="original reduce called"):
        moe.reduce(1)


def test_instances_and_subclasses_made_earlier_are_reached(stub: str) -> None:
    child = layers(stub).Child()
    patching.apply([seam(stub, "Row.forward", "self", "input_")])
    assert child.forward(1)[0] == "ours"


def test_staticmethods_stay_static(stub: str) -> None:
    patching.apply(table(stub))
    linear = layers(stub).Linear
    assert isinstance(vars(linear)["forward"], staticmethod)
    assert linear.forward("ctx", 2)[2:] == ("ctx", 2)
    assert linear().forward("ctx", 2)[2:] == ("ctx", 2)


def test_a_replacement_keeps_name_signature_and_original(stub: str) -> None:
    original = layers(stub).reduce
    patching.apply(table(stub))
    replaced = layers(stub).reduce
    assert replaced.__wrapped__ is original
    assert replaced.__name__ == "reduce"
    assert list(inspect.signature(replaced).parameters) == ["input_", "group"]


def test_apply_twice_wraps_once(stub: str) -> None:
    original = layers(stub).reduce
    patching.apply(table(stub))
    first = layers(stub).reduce
    patching.apply(table(stub))
    assert layers(stub).reduce is first
    assert first(1) == ("ours", original, 1)


def test_revert_restores_the_very_objects(stub: str) -> None:
    module = layers(stub)
    before = [vars(module)["reduce"], vars(module.Linear)["forward"], vars(module.Row)["forward"]]
    rows = [*table(stub), seam(stub, "Row.forward", "self", "input_")]
    for _ in range(2):
        patching.apply(rows)
        patching.revert(rows)
        after = [vars(module)["reduce"], vars(module.Linear)["forward"], vars(module.Row)["forward"]]
        assert all(old is new for old, new in zip(before, after, strict=True))
    patching.revert(rows)  # nothing applied: nothing to do


def test_importing_the_consumer_before_or_after_makes_no_difference(stub: str) -> None:
    patching.apply([seam(stub, "reduce", "input_", module="mappings")])
    assert layers(stub).Row().forward(1)[0] == "ours"  # layers was imported after mappings was patched
    patching.apply([seam(stub, "reduce", "input_")])
    assert layers(stub).Row().forward(1)[0] == "ours"


@pytest.mark.parametrize(
    ("name", "module", "params", "problem"),
    [
        ("gather", "layers", (), "gather: it does not exist"),
        ("Missing.forward", "layers", (), "Missing.forward: Missing does not exist"),
        (
            "Child.forward",
            "layers",
            ("self",),
            "Child.forward: it does not exist",
        ),  # inherited: revert could not be exact
        ("reduce", "absent", (), r"absent.reduce: stub_megatron.absent cannot be imported \(No module named"),
        (
            "reduce",
            "layers",
            ("input_", "axis"),
            r"expected parameters \(input_, axis, ...\), found \(input_, group=None\)",
        ),
        ("length", "moe", ("x",), "length: it does not exist"),
        ("__name__", "layers", ("x",), r"expected a function with parameters \(x, ...\), found 'stub_megatron.layers'"),
    ],
)
def test_one_row_that_does_not_fit_changes_nothing(
    stub: str, name: str, module: str, params: tuple[str, ...], problem: str
) -> None:
    original = layers(stub).reduce
    with pytest.raises(PatchError, match=problem) as raised:
        patching.apply([*table(stub), seam(stub, name, *params, module=module)])
    assert f"flash-comm cannot patch {stub}.{module}.{name}" in str(raised.value)
    assert "python -m flashcomm_megatron report" in str(raised.value)
    assert layers(stub).reduce is original
    assert [state for _, state in patching.status(table(stub))] == ["fits", "fits"]


def test_every_row_that_does_not_fit_is_named(stub: str) -> None:
    with pytest.raises(PatchError) as raised:
        patching.apply([seam(stub, "gather"), seam(stub, "scatter"), *table(stub)])
    assert "layers.gather" in str(raised.value) and "layers.scatter" in str(raised.value)


def test_a_failing_factory_changes_nothing(stub: str) -> None:
    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        raise ZeroDivisionError

    original = layers(stub).reduce
    with pytest.raises(ZeroDivisionError):
        patching.apply([*table(stub), Seam(f"{stub}.layers", "Row.forward", ("self",), broken, "a test")])
    assert layers(stub).reduce is original


def test_revert_refuses_when_somebody_patched_over_us(stub: str) -> None:
    patching.apply(table(stub))
    module = layers(stub)
    linear, replaced = vars(module.Linear)["forward"], module.reduce

    def stranger(input_: Any, group: Any = None) -> Any:
        return replaced(input_, group)

    module.reduce = stranger
    with pytest.raises(
        PatchError, match=r"layers\.reduce: it was patched again by .*stranger \(.*test_patching\.py:\d+\)"
    ):
        patching.revert(table(stub))
    assert vars(module.Linear)["forward"] is linear  # nothing was restored
    assert module.reduce is stranger
    assert patching.status(table(stub))[0][1].startswith("patched again by ")
    module.reduce = replaced
    patching.revert(table(stub))
    assert [state for _, state in patching.status(table(stub))] == ["fits", "fits"]


def test_a_name_deleted_under_us_is_refused(stub: str) -> None:
    patching.apply(table(stub))
    replaced = layers(stub).reduce
    del layers(stub).reduce
    with pytest.raises(PatchError, match="patched again by"):
        patching.revert(table(stub))
    layers(stub).reduce = replaced


def test_status_tells_every_state(stub: str) -> None:
    rows = [*table(stub), seam(stub, "gather")]
    patching.apply(rows[:1])
    assert patching.status(rows) == [
        (f"{stub}.layers.reduce", "patched"),
        (f"{stub}.layers.Linear.forward", "fits"),
        (f"{stub}.layers.gather", "it does not exist"),
    ]


def test_every_symbol_is_logged(stub: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="flashcomm_megatron"):
        patching.apply(table(stub))
        patching.revert(table(stub))
    paths = [f"{stub}.layers.reduce", f"{stub}.layers.Linear.forward"]
    assert caplog.messages == [f"patched {path}" for path in paths] + [f"restored {path}" for path in reversed(paths)]
