"""Local W&B runs, the W&B service and workspaces: a real offline run is read back, the service is a stand-in."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from patience import patient

from flashcomm_megatron.tools.compare import table, wandb_file, workspace
from flashcomm_megatron.tools.compare.runs import CannotRead, Run, read

OFFLINE = """
import sys, time, pathlib
import wandb, flashcomm_megatron as fc
from flashcomm_megatron import config, counters
from flashcomm_megatron.counters import count_quantized
config.set_current(fc.Config(bits=5))
run = wandb.init(project="p", mode="offline", dir=sys.argv[1], settings=wandb.Settings(silent=True))
for step in range(10, 50, 10):
    count_quantized(1000, 300, 0.5)
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
    subprocess.run([sys.executable, "-c", OFFLINE, str(folder)], check=True, timeout=patient(120))
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


def is_history(record: bytes) -> bool:
    from wandb.proto import wandb_internal_pb2 as schema

    return bool(schema.Record.FromString(record).HasField("history"))


def test_a_torn_wandb_file_keeps_its_whole_records(offline: Path, tmp_path: Path) -> None:
    [whole] = offline.glob("*.wandb")
    content = whole.read_bytes()
    rows = [end for data, end in wandb_file.records(content) if is_history(data)]
    torn = tmp_path / "run-torn.wandb"
    torn.write_bytes(content[: rows[2] + 30])
    run = read(str(torn))
    assert run.name == "torn" and len(run.rows) == 3
    assert "ends within a record" in run.notes[0]


def test_a_damaged_chunk_ends_the_reading(offline: Path, tmp_path: Path) -> None:
    [whole] = offline.glob("*.wandb")
    content = bytearray(whole.read_bytes())
    ends = [end for _, end in wandb_file.records(bytes(content))]
    content[ends[-2] + 9] ^= 1
    assert [end for _, end in wandb_file.records(bytes(content))] == ends[:-1]


def test_records_that_cross_blocks_are_read() -> None:
    def chunk(kind: int, data: bytes) -> bytes:
        return struct.pack("<IHB", zlib.crc32(bytes([kind]) + data), len(data), kind) + data

    first, second = bytes(range(256)) * 100, bytes(range(1, 256)) * 101
    log = b":W&B\xe1\xbe\x00" + chunk(1, first)
    room = 32768 - len(log) - 7
    log += chunk(2, second[:room]) + chunk(4, second[room:])
    log += chunk(1, bytes(65536 - len(log) - 7 - 3)) + bytes(3) + chunk(1, b"end")  # 3 bytes of padding
    assert [data for data, _ in wandb_file.records(log)][::3] == [first, b"end"]
    assert [data for data, _ in wandb_file.records(log)][1] == second


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
def test_the_workspace_holds_the_same_comparison(offline: Path) -> None:
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    run = read(str(offline))
    other = Run("base", "team/project/xyz", {}, run.rows)
    view = workspace.workspace("team/project", table.Comparison([other, run], other, "lm loss"))
    assert (view.entity, view.project) == ("team", "project")
    assert view.runset_settings.baseline_run == "xyz" and view.runset_settings.pinned_runs == ["xyz", run.name]
    spec = view._to_model().spec.model_dump_json()  # what save() would send
    for scalar in ("lm loss", "flash-comm/wire-bytes", "flash-comm/compression", "flash-comm/seconds"):
        assert scalar in spec
