"""Metrics: scalars equal the counters, errors equal the codec's, each destination gets them at the run's own step."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import spawn
from torch import Tensor

import flashcomm_megatron as fc
from flashcomm_megatron import config
from flashcomm_megatron.megatron import patching, training_log
from flashcomm_megatron.observe import error_sampling as sampling
from flashcomm_megatron.observe import messages
from flashcomm_megatron.observe.metrics import send

CONFIG = fc.Config(bits=4, min_bytes=0)
CODEC = CONFIG.legs.reduce
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No counts, samples, destinations or configuration left over from another test."""
    fc.reset_stats()
    sampling.reset()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield
    config.set_current(None)


def values(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- scalars --------------------------------------------------------------------------------------------------------


def some_calls(rank: int, world: int, folder: str) -> dict[str, float]:
    config.set_current(fc.Config(bits=4, min_bytes=1024, metrics=f"{folder}/run.jsonl"))
    for _ in range(3):
        fc.all_reduce(values(4096, rank))
    fc.all_reduce(values(8, rank))
    fc.all_gather(values(4096, rank))
    return fc.log_metrics(7, {"loss": 2.5})


def test_scalars_of_a_run_are_those_counted(tmp_path: Path) -> None:
    seen = spawn(some_calls, 2, str(tmp_path))
    wire = 3 * fc.wire_bytes(4096, CONFIG) + fc.wire_bytes(4096, CONFIG, "gather") + 8 * 4
    exact = 4 * 4096 * 4 + 8 * 4
    for scalars in seen:
        assert scalars["loss"] == 2.5
        assert scalars["flash-comm/wire-bytes"] == wire
        assert scalars["flash-comm/exact-bytes"] == exact
        assert scalars["flash-comm/compression"] == exact / wire
        assert scalars["flash-comm/quantized-calls"] == 4
        assert scalars["flash-comm/deferred-calls"] == scalars["flash-comm/deferred-calls/below-1024-bytes"] == 1
        assert scalars["flash-comm/nan-blocks"] == 0
        assert scalars["flash-comm/seconds"] > 0
        assert {name for name in scalars if "rel-error" in name} == {
            "flash-comm/rel-error/all_reduce",
            "flash-comm/rel-error/all_gather",
        }
        assert 15 < scalars["flash-comm/snr-db/all_reduce"] < 30  # 4 bits of a block of 32
    assert [set(line) > {"step"} for line in lines(tmp_path / "run.jsonl")] == [False, True]  # one rank wrote


# ---- sampled error --------------------------------------------------------------------------------------------------


def relative_error(x: Tensor) -> float:
    found = fc.decode(fc.encode(x, CONFIG), x.shape, torch.float32, CONFIG).double()
    return float((x.double() - found).norm() / x.double().norm())


def test_error_is_that_of_the_first_rounding() -> None:
    x = values(1000)
    sampling.sample("all_reduce", x.view(10, 100), CODEC)
    assert sampling.read()["all_reduce"].relative == pytest.approx(relative_error(x), rel=1e-9)


def test_one_call_in_a_hundred_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(sampling, "measure", lambda x, codec: measured.append(x.numel()) or torch.zeros(3).double())
    for _ in range(2 * sampling.EVERY + 1):
        sampling.sample("all_reduce", values(64), CODEC)
    assert measured == [64] * 3


def test_windows_move_through_a_large_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WINDOW", 100)  # three blocks of 32
    monkeypatch.setattr(sampling, "EVERY", 1)
    x, starts = torch.arange(200.0), []
    monkeypatch.setattr(sampling, "measure", lambda x, codec: starts.append(x.tolist()) or torch.zeros(3).double())
    for _ in range(4):
        sampling.sample("all_reduce", x, CODEC)
    windows = [list(map(float, range(start, stop))) for start, stop in ((0, 96), (96, 192), (192, 200), (0, 96))]
    assert starts == windows


def test_reading_starts_anew_and_sums_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "EVERY", 1)
    parts = [values(320, seed) * 10**seed for seed in range(2)]
    for part in parts:
        sampling.sample("all_reduce", part, CODEC)
    assert sampling.read()["all_reduce"].relative == pytest.approx(relative_error(torch.cat(parts)), rel=1e-9)
    assert sampling.read() == {}


def test_a_block_that_is_not_finite_is_counted_and_left_out() -> None:
    x = values(320)
    clean = torch.cat([x[:64], x[96:]])
    x[70], x[80] = float("nan"), float("inf")
    sampling.sample("all_reduce", x, CODEC)
    assert sampling.read()["all_reduce"] == (pytest.approx(relative_error(clean), rel=1e-9), 1)


def test_exact_values_have_no_error_and_no_snr() -> None:
    sampling.sample("all_reduce", torch.zeros(64), CODEC)
    scalars = fc.metrics()
    assert scalars["flash-comm/rel-error/all_reduce"] == 0
    assert "flash-comm/snr-db/all_reduce" not in scalars


COPY: Any = SimpleNamespace(block=32, encode=lambda x: x, decode_sum=lambda payloads, out: out.copy_(payloads[0]))


def test_sampling_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*args: Any) -> Any:
        raise AssertionError("this would wait for the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero", "is_nonzero"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    for _ in range(sampling.EVERY + 1):
        sampling.sample("all_reduce", values(640), COPY)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampling_on_cuda_waits_for_nothing() -> None:
    x = values(640).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(sampling.EVERY + 1):
            sampling.sample("all_reduce", x, COPY)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sampling.read()["all_reduce"] == (0.0, 0)


# ---- destinations ---------------------------------------------------------------------------------------------------


class Wandb(ModuleType):
    """What we use of the wandb module, with an active run."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.run = SimpleNamespace(id=f"run {next(NUMBERS)}")  # a new run: it has our settings yet to get
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.configs: list[dict[str, Any]] = []
        self.config = SimpleNamespace(update=lambda entries, allow_val_change: self.configs.append(entries))

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.logged.append((step, scalars))


class Finished(Wandb):
    """A module whose run has been finished: everything raises."""

    def log(self, scalars: dict[str, float], step: int) -> None:
        raise RuntimeError("You must call wandb.init() before wandb.log()")


@pytest.mark.parametrize("wandb", [Finished(), ModuleType("wandb"), SimpleNamespace(run=SimpleNamespace())])
def test_a_wandb_that_cannot_log_is_said_once_and_stops_nothing(wandb: Any, caplog: pytest.LogCaptureFixture) -> None:
    config.set_current(CONFIG)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            send(step, {"flash-comm/calls": 1}, {}, wandb)
    assert sum("no metrics reach W&B" in record.message for record in caplog.records) == 1


class TensorBoard:
    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = value, step


def test_active_wandb_run_gets_scalars_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config.set_current(CONFIG)
    for step in (3, 4):
        fc.log_metrics(step, {"loss": torch.tensor([1.5])})
    assert [step for step, _ in wandb.logged] == [3, 4]
    assert wandb.logged[0][1]["loss"] == 1.5 and "flash-comm/wire-bytes" in wandb.logged[0][1]
    [entry] = wandb.configs
    settings = entry["flash-comm"]
    assert (settings["bits"], settings["recipe"], settings["block"], settings["version"], settings["transport"]) == (
        (4, "auto", CODEC.block, fc.__version__, "auto")
    )


def test_wandb_without_a_run_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    wandb.run = None  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    fc.log_metrics(1)
    assert wandb.logged == []


def test_a_tensorboard_writer_gets_each_scalar() -> None:
    writer = TensorBoard()
    logged = fc.log_metrics(5, {"loss": 1.0}, writer=writer)
    assert writer.scalars == {name: (value, 5) for name, value in logged.items()}


def test_file_holds_settings_then_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.jsonl"
    config.set_current(fc.Config(bits=4, metrics=str(path), log_interval=10))
    logged = [fc.log_metrics(step, {"loss": step / 2}) for step in (5, 10, 20)]
    first, *rest = lines(path)
    assert logged[0] == {}  # 10 does not divide 5
    assert first["config"]["flash-comm"]["bits"] == 4
    assert [(line["step"], line["loss"]) for line in rest] == [(10, 5.0), (20, 10.0)]
    assert all(line["flash-comm/compression"] == 1.0 and line["time"] > 0 for line in rest)


def test_file_torn_by_a_crash_loses_no_new_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    config.set_current(fc.Config(bits=4, metrics=str(path)))
    fc.log_metrics(3)
    assert [json.loads(line).get("step") for line in path.read_text().splitlines()[2:]] == [None, 3]


def test_file_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("")
    config.set_current(fc.Config(bits=4, metrics=str(tmp_path / "taken" / "run.jsonl")))
    with caplog.at_level(logging.WARNING):
        assert fc.log_metrics(1) and fc.log_metrics(2)
    assert len(caplog.records) == 1 and "--flash-comm-metrics" in caplog.text


def test_a_strict_run_whose_metrics_file_cannot_be_written_steps_on_and_fails_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_failed", None)
    monkeypatch.setattr(messages, "_raised", None)
    (tmp_path / "taken").write_text("")
    config.set_current(fc.Config(bits=4, strict=True, metrics=str(tmp_path / "taken" / "run.jsonl")))
    assert fc.log_metrics(1)
    with pytest.raises(RuntimeError, match="no metrics are written"):
        messages.last_verdict()


# ---- Megatron -------------------------------------------------------------------------------------------------------


def log_of_0_13(loss_dict: Any, total: Any, rate: Any, decoupled_rate: Any, iteration: int, loss_scale: Any) -> str:
    return "report"


def log_of_0_16(loss_dict: Any, total: Any, rate: Any, iteration: int, loss_scale: Any, group: Any = None) -> str:
    return "report"


class Megatron:
    """Fake ``megatron.training`` with the given training_log; ``order`` tells who logged when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, training_log: Callable[..., Any]) -> None:
        self.wandb, self.tensorboard = Wandb(), TensorBoard()
        self.writers: dict[str, Any] = {"wandb": self.wandb, "tensorboard": None}
        self.module = ModuleType("megatron.training.training")
        self.module.training_log = training_log  # type: ignore[attr-defined]
        self.original = training_log
        values = ModuleType("megatron.training.global_vars")
        values.get_args = lambda: SimpleNamespace(log_interval=5)  # type: ignore[attr-defined]
        values.get_wandb_writer = lambda: self.writers["wandb"]  # type: ignore[attr-defined]
        values.get_tensorboard_writer = lambda: self.writers["tensorboard"]  # type: ignore[attr-defined]
        package = ModuleType("megatron.training")
        package.global_vars = values  # type: ignore[attr-defined]
        package.__path__ = []
        for module in (package, values, self.module):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def log(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.training_log(*args, **kwargs)


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> Iterator[Megatron]:
    made = Megatron(monkeypatch, log_of_0_16)
    config.set_current(CONFIG)
    training_log.install()
    yield made
    training_log.uninstall()
    assert made.module.training_log is made.original


LOSSES = {"lm loss": torch.tensor([4.25])}


def test_wandb_needs_no_tensorboard(megatron: Megatron) -> None:
    assert megatron.log(LOSSES, {}, 0.1, 10, 1.0) == "report"
    [(step, scalars)] = megatron.wandb.logged
    assert step == 10 and scalars["lm loss"] == 4.25 and "flash-comm/wire-bytes" in scalars
    assert megatron.wandb.configs[0]["flash-comm"]["bits"] == 4


def test_tensorboard_gets_ours_only(megatron: Megatron) -> None:
    megatron.writers |= {"wandb": None, "tensorboard": megatron.tensorboard}
    megatron.log(LOSSES, {}, 0.1, 10, 1.0)
    assert megatron.tensorboard.scalars["flash-comm/compression"] == (1.0, 10)
    assert "lm loss" not in megatron.tensorboard.scalars  # Megatron's own line


def test_logging_happens_once_an_interval(megatron: Megatron) -> None:
    for step in range(1, 16):
        megatron.log(LOSSES, {}, 0.1, iteration=step, loss_scale=1.0)
    assert [step for step, _ in megatron.wandb.logged] == [5, 10, 15]
    config.set_current(fc.Config(bits=4, log_interval=7))
    for step in range(16, 22):
        megatron.log(LOSSES, {}, 0.1, iteration=step, loss_scale=1.0)
    assert megatron.wandb.logged[-1][0] == 21 and len(megatron.wandb.logged) == 4


def test_a_rank_without_writers_reads_nothing(megatron: Megatron) -> None:
    megatron.writers["wandb"] = None
    sampling.sample("all_reduce", values(64), CODEC)
    megatron.log(LOSSES, {}, 0.1, 10, 1.0)
    assert "all_reduce" in sampling.read()


def test_the_metrics_file_needs_no_writer(megatron: Megatron, tmp_path: Path) -> None:
    megatron.writers["wandb"] = None
    config.set_current(fc.Config(bits=4, metrics=str(tmp_path / "run.jsonl")))
    megatron.log(LOSSES, {}, 0.1, 10, 1.0)
    assert lines(tmp_path / "run.jsonl")[1]["lm loss"] == 4.25


def test_when_off_nothing_is_logged(megatron: Megatron) -> None:
    config.set_current(None)
    assert megatron.log(LOSSES, {}, 0.1, 10, 1.0) == "report"
    assert megatron.wandb.logged == []


def test_the_step_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    older = Megatron(monkeypatch, log_of_0_13)
    config.set_current(CONFIG)
    training_log.install()
    older.log(LOSSES, {}, 0.1, None, 10, 1.0)
    training_log.uninstall()
    assert older.wandb.logged[0][0] == 10


def test_a_log_without_a_step_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newer = Megatron(monkeypatch, lambda loss_dict, progress: None)
    config.set_current(CONFIG)
    with caplog.at_level(logging.WARNING):
        training_log.install()
    assert newer.module.training_log is newer.original
    assert "expected a parameter iteration, found (loss_dict, progress)" in caplog.text
    assert "log_metrics" in caplog.text


def test_enable_wraps_and_disable_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    fake = Megatron(monkeypatch, log_of_0_16)
    fc.enable(bits=4)
    assert fake.module.training_log is not fake.original
    fc.disable()
    assert fake.module.training_log is fake.original
    assert patching.status([training_log.SEAM]) == [(training_log.SEAM.path, "fits")]
