"""Local W&B runs, the W&B service and workspaces: a real offline run is read back, the service is a stand-in."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import forks
import pytest

from flashcomm_megatron.tools.compare import command, table, workspace
from flashcomm_megatron.tools.compare.runs import CannotRead, Run, read

OFFLINE = """
import sys, time, pathlib, types
import wandb, flashcomm_megatron as fc
from flashcomm_megatron import config
from flashcomm_megatron.observe.counters import count_quantized
config.set_current(fc.Config(bits=5))
run = wandb.init(project="p", mode="offline", dir=sys.argv[1], settings=wandb.Settings(silent=True))
for step in range(10, 50, 10):
    count_quantized(types.SimpleNamespace(exact_bytes=1000, wire_bytes=300, remote_bytes=0), 0.5)
    fc.log_metrics(step, {"lm loss": 100 / step})
file = pathlib.Path(run.dir).parent / f"run-{run.id}.wandb"
run.finish()
while not file.stat().st_size:  # the service writes on after finish(), and dies with this process
    time.sleep(0.1)
time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real offline run, four lines long, logged by log_metrics."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    folder = tmp_path_factory.mktemp("offline")
    forks.python("-c", OFFLINE, str(folder)).check_returncode()
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    return file.parent


def test_a_real_offline_run_is_read_back(offline: Path) -> None:
    run = read(str(offline))
    assert run.series("flash-comm/wire-bytes") == ([10, 20, 30, 40], [300, 600, 900, 1200])
    assert run.series("flash-comm/exact-bytes")[1] == [1000, 2000, 3000, 4000]
    assert run.series("flash-comm/seconds")[1] == [0.5, 1.0, 1.5, 2.0]
    assert run.series("lm loss")[1] == [10, 5, 100 / 30, 2.5]
    assert run.settings["bits"] == 5 and run.settings["recipe"] == "auto"
    assert all(row["time"] > 1e9 for row in run.rows)
    assert run.notes == [] and run.name in offline.name


def test_a_torn_wandb_file_keeps_its_whole_records(offline: Path, tmp_path: Path) -> None:
    [whole] = offline.glob("*.wandb")
    content = whole.read_bytes()
    torn = tmp_path / "run-torn.wandb"
    torn.write_bytes(content[: content.rindex(b"lm loss")])  # within the last step's record
    run = read(str(torn))
    assert run.name == "torn" and len(run.rows) == 3
    assert "incomplete .wandb file" in run.notes[0] and "3 rows were read." in run.notes[0]


def test_a_wandb_that_cannot_print_is_said(offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An older release has no such command."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("")
    (tmp_path / "wandb" / "__main__.py").write_text("raise SystemExit(\"Error: No such command 'leet'.\")")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(CannotRead, match=r"wandb [\d.]+ cannot print a run's file: pip install 'wandb>=0.31'"):
        read(str(offline))


def test_an_empty_wandb_file_is_said(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    (tmp_path / "run-x.wandb").write_bytes(b"")
    with pytest.raises(CannotRead, match=r"holds no W&B records \(the run may have died before its first line\)"):
        read(str(tmp_path))


def test_a_run_of_wandbs_service_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    history = [{"_step": 1, "_timestamp": 5.0, "lm loss": 2.0, "flash-comm/wire-bytes": 7, "note": "x", "bad": "NaN"}]
    found = SimpleNamespace(name="nice-name", config={"flash-comm": {"bits": 4}}, scan_history=lambda: history)
    fake = ModuleType("wandb")
    fake.Api = lambda: SimpleNamespace(run=lambda path: found)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = read("team/project/abc")
    assert run.name == "nice-name" and run.settings == {"bits": 4}
    assert {name: value for name, value in run.rows[0].items() if name != "bad"} == {
        "step": 1, "time": 5.0, "lm loss": 2.0, "flash-comm/wire-bytes": 7,
    }  # fmt: skip
    assert math.isnan(run.rows[0]["bad"])


def test_a_service_that_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise ConnectionError("not logged in")

    fake = ModuleType("wandb")
    fake.Api = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(CannotRead, match=r"team/project/abc: .*ConnectionError: not logged in.*wandb login"):
        read("team/project/abc")


def test_without_wandb_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "wandb.proto", None)
    (tmp_path / "run-x.wandb").write_bytes(b":W&B\xe1\xbe\x00")
    for source in (str(tmp_path), "team/project/abc"):
        with pytest.raises(CannotRead, match=r"pip install 'flashcomm_megatron\[wandb\]'"):
            read(source)


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_json_lines_is_no_run_of_a_workspace(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    (tmp_path / "run.jsonl").touch()
    run = Run("run", str(tmp_path / "run.jsonl"), {}, [])
    with pytest.raises(CannotRead, match="is no W&B run: name runs of the project"):
        workspace.workspace("team/project", table.Comparison([run], None, None))


@pytest.mark.filterwarnings("ignore")
def test_the_command_saves_the_workspace_and_says_where(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspaces = pytest.importorskip("wandb_workspaces.workspaces", reason="wandb-workspaces is not installed")
    saved: list[Any] = []
    monkeypatch.setattr(workspaces.Workspace, "save", lambda view: saved.append(view) or SimpleNamespace(url="HERE"))
    page = tmp_path / "compare.html"
    assert command.main([str(offline), "--out", str(page), "--wandb", "team/project"]) == 0
    assert page.exists() and "saved HERE" in capsys.readouterr().out
    [view] = saved
    assert [section.name.removeprefix("flash-comm: ") for section in view.sections][:3] == ["quality", "bytes", "time"]


@pytest.mark.filterwarnings("ignore")
def test_the_workspace_holds_the_same_comparison(offline: Path) -> None:
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    run = read(str(offline))
    other = Run("base", "team/project/xyz", {}, run.rows)
    view = workspace.workspace("team/project", table.Comparison([other, run], other, "lm loss"))
    assert (view.entity, view.project) == ("team", "project")
    assert view.runset_settings.baseline_run == "xyz" and view.runset_settings.pinned_runs == ["xyz", run.name]
    spec = view._to_model().spec.model_dump_json()  # what save() would send
    assert "4 bits: " in spec or "5 bits: " in spec  # the headline, in words
    for title in ("quality", "bytes", "time", "errors by kind of layer"):
        assert f"flash-comm: {title}" in spec
    assert "nats a token" in spec and "bytes sent by a rank" in spec
    for scalar in ("lm loss", "flash-comm/wire-bytes", "flash-comm/compression", "flash-comm/seconds"):
        assert scalar in spec
