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
        ("reduce", "layers", ("input_", "axis"), r"expected parameters \(input_, axis, ...\), found \(input_, group\)"),
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


# ---- whole signatures -----------------------------------------------------------------------------------------------


def knows_two(original: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement that names two parameters and says what it had to do."""

    def replacement(a: Any, b: Any = 0) -> tuple[Any, ...]:
        unknown = patching.unknown_argument()
        return ("original", unknown, original(a, b)) if unknown else ("ours", a, b)

    return replacement


def patched(stub: str, source: str, replace: Callable[..., Any] = knows_two) -> Any:
    """The function ``f`` of ``source``, patched."""
    module = layers(stub)
    exec(source, vars(module))
    name = next(iter(inspect.signature(module.f).parameters))
    patching.apply([Seam(f"{stub}.layers", "f", (name,), replace, "a test")])
    return module.f


def test_an_argument_that_the_replacement_does_not_know_reaches_the_original(stub: str) -> None:
    f = patched(stub, "def f(a, b=0, c=False, *, d=None, **more): return (a, b, c, d, more)")
    assert f(1) == ("ours", 1, 0) and f(1, b=2) == ("ours", 1, 2)
    assert f(1, 2, True) == ("original", "c", (1, 2, True, None, {}))
    assert f(1, d="x") == ("original", "d", (1, 0, False, "x", {}))
    assert f(1, new=5) == ("original", "new", (1, 0, False, None, {"new": 5}))
    assert patching.unknown_argument() is None


def test_an_argument_equal_to_its_default_asks_for_nothing(stub: str) -> None:
    f = patched(stub, "def f(a, b=0, c=False, *, d=None): return (a, b, c, d)")
    assert f(1, 2, False, d=None) == ("ours", 1, 2)
    assert f(1, c=False) == ("ours", 1, 0)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def f(a, c, b=0): ...", "its replacement takes b where the original has c"),
        ("def f(a): ...", "its replacement takes b where the original has nothing"),
        ("def f(a=None, b=0): ...", "its replacement needs a, which the original does not"),
        ("def f(a, b=1): ...", "the default of b was 0 and is 1"),
    ],
)
def test_a_replacement_that_would_break_a_caller_is_refused(stub: str, source: str, problem: str) -> None:
    with pytest.raises(PatchError, match=f"cannot patch {stub}.layers.f: {problem}"):
        patched(stub, source)


def test_the_state_says_which_arguments_are_left_to_the_original(stub: str) -> None:
    exec("def f(a, b=0, c=0, d=0): ...", vars(layers(stub)))
    row = Seam(f"{stub}.layers", "f", ("a",), knows_two, "a test")
    assert patching.status([row]) == [(row.path, "fits; with c or d the original is called")]


def test_every_row_accepts_what_newer_dispatchers_pass(stub: str) -> None:
    """Megatron 0.18 and later always pass ``use_nccl_stream`` to all_to_all."""
    import torch

    import flashcomm_megatron as fc
    from flashcomm_megatron.config import set_current
    from flashcomm_megatron.megatron import experts

    source = (
        "def f(a, input_, output_split_sizes_=None, input_split_sizes=None, *, use_nccl_stream=False): return input_"
    )
    f, x = patched(stub, source.replace("a,", "group,", 1), experts.tokens), torch.ones(4, 8)
    fc.reset_stats()
    set_current(fc.Config(bits=8, experts=True))
    try:
        assert f(None, x, [4], [4], use_nccl_stream=True) is x
    finally:
        set_current(None)
    assert fc.stats()["deferred"] == {"argument use_nccl_stream": 1}
