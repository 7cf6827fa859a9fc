"""What the user is told: the one line, the loud one, and that strict makes an error of it. No Megatron needed."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

import flashcomm_megatron as fc
from flashcomm_megatron import config
from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.megatron import coverage, experts, model
from flashcomm_megatron.observe import messages

MEGATRONS = "megatron.core.tensor_parallel.layers"  # what the classes below claim as their module
PATCHED = "8 names patched in megatron-core 0.16.1"


class RowParallelLinear(nn.Module):
    """Stands for Megatron's own layer; ``collective`` is what it does to the counters."""

    __module__ = MEGATRONS

    def __init__(self, collective: Callable[[], None]) -> None:
        super().__init__()
        self.collective = collective

    def forward(self, x: Tensor) -> Tensor:
        self.collective()
        return x


class TERowParallelLinear(nn.Module):
    """Stands for Transformer Engine's layer, which communicates out of our sight."""

    __module__ = MEGATRONS

    def forward(self, x: Tensor) -> Tensor:
        return x


class InferenceRowParallelLinear(TERowParallelLinear):
    """Stands for Megatron's inference-optimized layer, a child of the above."""


class TEFusedMLP(nn.Module):
    """Stands for Megatron's fused feed-forward, which runs its row-parallel layer inside, as no module."""

    __module__ = MEGATRONS

    def forward(self, x: Tensor) -> Tensor:
        return x


def quantize() -> None:
    count("count_quantized", SimpleNamespace(exact_bytes=100, wire_bytes=25, remote_bytes=0), 0.0)


def defer() -> None:
    count("count_deferred", "below 16384 bytes", 100)


def count(name: str, *args: object) -> None:
    getattr(sys.modules["flashcomm_megatron.observe.counters"], name)(*args)


@pytest.fixture(autouse=True)
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """4 bits in force, nothing said yet, no hook left behind."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(messages, "_said", set())
    monkeypatch.setattr(messages, "_failed", None)
    monkeypatch.setattr(messages, "_raised", None)
    config.set_current(fc.Config(bits=4))
    yield
    coverage.stop()
    config.set_current(None)
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks


def forward(*layers: nn.Module) -> None:
    nn.Sequential(*layers)(torch.zeros(1))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said beyond the lines of level INFO."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def started() -> None:
    coverage.start(PATCHED)


def test_any_class_is_in_reach_that_compresses_or_defers(caplog: pytest.LogCaptureFixture) -> None:
    class AnyRowParallelLinear(RowParallelLinear):
        pass

    coverage.start(PATCHED)
    forward(RowParallelLinear(quantize), AnyRowParallelLinear(defer))
    assert warnings(caplog) == []


def test_a_layer_that_sums_past_us_is_named_whatever_its_class(caplog: pytest.LogCaptureFixture) -> None:
    """A subclass whose forward sums by a name that it imported earlier, among layers that are reached."""
    coverage.start(PATCHED)
    forward(RowParallelLinear(quantize), RowParallelLinear(lambda: None), RowParallelLinear(quantize))
    assert "uses 1 x RowParallelLinear, whose communication is not patched (first: 1)" in caplog.text


def test_layers_that_have_nothing_to_sum_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    alone, expert = RowParallelLinear(lambda: None), RowParallelLinear(lambda: None)
    alone.tp_group, expert.is_expert = SimpleNamespace(size=lambda: 1), True  # type: ignore[assignment]
    coverage.start(PATCHED)
    forward(RowParallelLinear(quantize), alone, expert)
    assert warnings(caplog) == []


def test_one_line_says_what_is_on(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):  # enabled twice, said once
        started()
        forward(RowParallelLinear(quantize))
        forward(RowParallelLinear(quantize))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("flash-comm: 4-bit auto (block 32), ")
    assert line.endswith(f"{PATCHED}; exact: embedding, output layer, router, loss")
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    "grad_bits, says, exact", [(8, "gradients 8-bit, ", ""), (16, "", "gradients, "), (5, "gradients 5-bit, ", "")]
)
def test_the_line_says_what_happens_to_gradients(grad_bits: int, says: str, exact: str) -> None:
    config.set_current(fc.Config(bits=4, grad_bits=grad_bits))
    line = messages.headline(PATCHED)
    assert line.startswith(f"flash-comm: 4-bit auto (block 32), {says}{extension.describe()}")
    assert line.endswith(f"; exact: {exact}embedding, output layer, router, loss")


def test_no_block_is_named_where_there_are_none() -> None:
    config.set_current(fc.Config(bits=4, recipe="outlier", calibration="ranges.safetensors"))
    assert messages.headline(PATCHED).startswith("flash-comm: 4-bit outlier, ")


def test_only_rank_0_speaks(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    started()
    forward(RowParallelLinear(defer))
    assert capsys.readouterr().out == "" and warnings(caplog) == []


def test_a_first_forward_that_quantized_nothing_is_loud(caplog: pytest.LogCaptureFixture) -> None:
    started()
    layer = RowParallelLinear(defer)
    forward(layer, nn.Linear(1, 1), RowParallelLinear(defer))
    assert warnings(caplog) == [
        "flash-comm is on (4-bit) but after the first forward no collective was quantized "
        "(deferred: 2 x below 16384 bytes)."
    ]
    assert any(record.levelno == logging.WARNING for record in caplog.records)
    nn.Sequential(layer)(torch.zeros(1))
    assert len(warnings(caplog)) == 1  # the first forward only


def test_what_was_counted_before_is_not_the_models(caplog: pytest.LogCaptureFixture) -> None:
    quantize()
    started()
    forward(RowParallelLinear(defer))
    assert "no collective was quantized (deferred: 1 x below 16384 bytes)" in caplog.text


@pytest.mark.parametrize("foreign", [TERowParallelLinear, InferenceRowParallelLinear, TEFusedMLP])
def test_layers_out_of_reach_are_named(caplog: pytest.LogCaptureFixture, foreign: type[nn.Module]) -> None:
    started()
    forward(foreign(), foreign())
    assert warnings(caplog) == [
        f"flash-comm is on (4-bit) but the model uses 2 x {foreign.__name__}, whose communication is not patched "
        "(first: 0). Add --transformer-impl local, or expect these sums to stay exact."
    ]


def test_strict_fails_when_one_layer_is_out_of_reach() -> None:
    config.set_current(fc.Config(bits=4, strict=True))
    started()
    with pytest.raises(RuntimeError, match="1 x TERowParallelLinear"):
        forward(TERowParallelLinear(), RowParallelLinear(quantize))


@pytest.mark.parametrize("layer", [RowParallelLinear(defer), TERowParallelLinear()])
def test_strict_makes_it_an_error_on_every_rank(monkeypatch: pytest.MonkeyPatch, layer: nn.Module) -> None:
    monkeypatch.setenv("RANK", "1")
    config.set_current(fc.Config(bits=4, strict=True))
    started()
    with pytest.raises(RuntimeError, match=r"flash-comm is on \(4-bit\) but .* \(--flash-comm-strict\)"):
        forward(layer)
    forward(layer)  # judged once


def test_models_without_row_parallel_layers_are_waited_out(caplog: pytest.LogCaptureFixture) -> None:
    started()
    forward(nn.Linear(1, 1))
    assert warnings(caplog) == []
    forward(RowParallelLinear(defer))
    assert "no collective was quantized" in caplog.text


def test_a_forward_that_raises_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    started()
    with pytest.raises(ZeroDivisionError):
        forward(RowParallelLinear(defer), RowParallelLinear(fail))
    assert warnings(caplog) == []
    forward(RowParallelLinear(defer))
    assert "(deferred: 1 x below 16384 bytes)" in caplog.text


def test_the_hooks_are_gone_after_the_first_forward() -> None:
    started()
    assert hooks._global_forward_hooks and hooks._global_forward_pre_hooks
    forward(RowParallelLinear(quantize))
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks


def test_a_model_built_after_the_first_forward_is_judged_by_its_own() -> None:
    config.set_current(fc.Config(bits=4, strict=True))
    started()
    first = nn.Sequential(RowParallelLinear(quantize))
    first(torch.zeros(1))
    second = nn.Sequential(RowParallelLinear(quantize), TERowParallelLinear())
    first(torch.zeros(1))  # says nothing of the second
    with pytest.raises(RuntimeError, match="1 x TERowParallelLinear"):
        second(torch.zeros(1))
    assert not hooks._global_forward_hooks
    coverage.stop()
    assert not hooks._global_module_registration_hooks


def test_a_model_built_before_anothers_first_forward_is_judged_by_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Chunks of a virtual pipeline; a model and its reference."""
    started()
    first, second = nn.Sequential(RowParallelLinear(quantize)), nn.Sequential(TERowParallelLinear())
    for _ in range(coverage.PATIENCE):
        first(torch.zeros(1))
    assert warnings(caplog) == [] and hooks._global_forward_hooks
    second(torch.zeros(1))
    assert "uses 1 x TERowParallelLinear" in caplog.text and not hooks._global_forward_hooks


class ColumnParallelLinear(nn.Module):
    """Stands for Megatron's own layer, whose forward is ours: it asks whether it is the output layer."""

    def forward(self, x: Tensor) -> Tensor:
        model.is_output_layer(self, None)
        return x


def test_a_model_that_nobody_told_of_is_judged_by_its_own_first_forward(caplog: pytest.LogCaptureFixture) -> None:
    """The second of two that were built before; a copy; each part from the first layer on that is ours."""

    def build(*middle: nn.Module) -> nn.Module:
        rows = RowParallelLinear(quantize), *middle
        return nn.Sequential(ColumnParallelLinear(), nn.Sequential(*rows), RowParallelLinear(defer))

    first, second = build(), build(TERowParallelLinear())
    coverage.start(PATCHED)
    first(torch.zeros(1))
    for judged in (second, copy.deepcopy(second)):
        caplog.clear()
        messages._said.clear()
        judged(torch.zeros(1))
        assert warnings(caplog) == [
            "flash-comm is on (4-bit) but the model uses 1 x TERowParallelLinear, whose communication is not patched "
            "(first: 1.1). Add --transformer-impl local, or expect these sums to stay exact."
        ]
        assert coverage._watch is not None and not coverage._watch.waiting & set(judged.modules())
    judged(torch.zeros(1))
    assert len(warnings(caplog)) == 1


def test_a_class_of_that_name_that_is_not_megatrons_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    foreign = type("RowParallelLinear", (nn.Identity,), {"__module__": "vllm.model_executor.layers.linear"})
    coverage.start(PATCHED)
    forward(foreign(), RowParallelLinear(quantize))
    assert warnings(caplog) == []


def test_what_is_built_later_has_all_the_patience(caplog: pytest.LogCaptureFixture) -> None:
    coverage.start(PATCHED)
    first, unused = nn.Sequential(RowParallelLinear(quantize)), nn.Sequential(RowParallelLinear(quantize))
    for _ in range(coverage.PATIENCE):
        first(torch.zeros(1))
    second = nn.Sequential(TERowParallelLinear())
    for _ in range(coverage.PATIENCE - 1):
        first(torch.zeros(1))
    second(torch.zeros(1))
    assert "uses 1 x TERowParallelLinear" in caplog.text and len(unused) == 1


def test_arguments_that_were_changed_are_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    finished = SimpleNamespace(flash_comm_bits=4)
    monkeypatch.setattr(config, "_finished", None)
    config.finish(finished)
    finished.flash_comm_recipe = "flash-v1"
    coverage.start(PATCHED)
    forward(RowParallelLinear(quantize))
    forward(RowParallelLinear(quantize))
    coverage.close()
    assert len(warnings(caplog)) == 1 and "flash_comm_recipe was changed" in caplog.text


def test_arguments_that_were_changed_late_are_an_error_of_the_first_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    finished = SimpleNamespace(flash_comm_bits=4)
    monkeypatch.setattr(config, "_finished", None)
    config.finish(finished)
    finished.flash_comm_recipe = "flash-v1"
    config.set_current(fc.Config(bits=4, strict=True))
    started()
    with pytest.raises(RuntimeError, match="flash_comm_recipe was changed from None to flash-v1"):
        forward(RowParallelLinear(quantize))


def test_a_layer_that_never_runs_is_not_waited_for_forever(caplog: pytest.LogCaptureFixture) -> None:
    started()
    first, unused = nn.Sequential(RowParallelLinear(quantize)), nn.Sequential(TERowParallelLinear())
    for _ in range(coverage.PATIENCE + 1):
        first(torch.zeros(1))
    assert not hooks._global_forward_hooks and warnings(caplog) == [] and len(unused) == 1


def test_the_end_is_loud_if_no_layer_ever_ran(caplog: pytest.LogCaptureFixture) -> None:
    started()
    forward(nn.Linear(1, 1))
    coverage.close()
    coverage.close()
    assert warnings(caplog) == ["flash-comm is on (4-bit) but no tensor-parallel layer ran, so nothing was compressed."]


def test_the_end_is_silent_after_a_forward_when_disabled_and_after_a_crash(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    started()
    forward(RowParallelLinear(quantize))
    coverage.close()
    started()
    coverage.stop()
    coverage.close()
    started()
    monkeypatch.setattr(sys, "last_value", ValueError("the script crashed"), raising=False)
    coverage.close()
    assert warnings(caplog) == []


def test_strict_holds_at_the_end_as_well() -> None:
    config.set_current(fc.Config(bits=4, strict=True))
    started()
    with pytest.raises(RuntimeError, match="no tensor-parallel layer ran"):
        coverage.close()


class MoELayer(ColumnParallelLinear):
    """Stands for a mixture of experts."""


@pytest.mark.parametrize(
    ("layers", "experts_of_model", "fails"),
    [((), None, True), ((), 8, False), ((MoELayer(),), 8, True)],
    ids=["a model without experts", "a stage without its model's experts", "experts that were not reached"],
)
def test_experts_tokens_that_were_asked_for_and_never_came_are_an_error_of_the_end(
    monkeypatch: pytest.MonkeyPatch, layers: tuple[nn.Module, ...], experts_of_model: int | None, fails: bool
) -> None:
    monkeypatch.setattr(experts._Tokens, "ran", False)
    monkeypatch.setattr(experts, "_held", set())
    config.set_current(fc.Config(bits=4, strict=True, experts=True))
    started()
    stage = nn.Sequential(ColumnParallelLinear(), RowParallelLinear(quantize), *layers)
    stage.config = SimpleNamespace(num_moe_experts=experts_of_model)  # type: ignore[assignment]
    stage(torch.zeros(1))
    if not fails:
        return coverage.close()
    with pytest.raises(RuntimeError, match="--flash-comm-experts did nothing"):
        coverage.close()
