"""Comparing runs: what is read, what the table says, and what happens to runs that are damaged, foreign or absent."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashcomm_megatron.tools.compare import command, page, plots, table
from flashcomm_megatron.tools.compare.runs import CannotRead, Run, read

GIB = 2**30


def write(path: Path, bits: int = 4, steps: int = 10, loss: float = 2.0, ours: bool = True) -> Path:
    """A run of ``steps`` lines: 1 s a step, 1 GiB exact and 1/4 GiB on the wire a step, its loss constant."""
    rows: list[dict[str, Any]] = [{"config": {"flash-comm": {"bits": bits, "recipe": "auto"}}, "time": 100.0}]
    for step in range(1, steps + 1):
        row = {"step": step, "time": 100.0 + step, "lm loss": loss}
        scalars = {"wire-bytes": step * GIB / 4, "exact-bytes": step * GIB, "compression": 4.0, "nan-blocks": 1}
        scalars |= {"seconds": step / 10, "deferred-calls": 2 * step, "rel-error/row": 0.05 * step}
        rows.append(row | ({f"flash-comm/{name}": value for name, value in scalars.items()} if ours else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """(exit code, the page, what was said on stderr)."""
    out = tmp_path / "out.html"
    code = command.main([*map(str, args), "--out", str(out)])
    return code, out.read_text() if out.exists() else "", capsys.readouterr().err


def rows(what: table.Comparison) -> dict[str, table.Row]:
    return {row.label: row for row in table.final_rows(what)}


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def test_a_metrics_file_is_read(tmp_path: Path) -> None:
    run = read(str(write(tmp_path / "four.jsonl", steps=3)))
    assert run.name == "four" and run.settings == {"bits": 4, "recipe": "auto"} and run.notes == []
    assert run.series("flash-comm/wire-bytes") == ([1, 2, 3], [GIB / 4, GIB / 2, GIB * 3 / 4])


def test_a_line_cut_off_costs_that_line_only(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", steps=5)
    path.write_text(path.read_text()[:-20])
    run = read(str(path))
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4]
    assert run.notes == [f"{path}: line 6 is no JSON (cut off while it was written): left out, 4 rows kept."]


def test_a_damaged_line_in_between_costs_that_line_only(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", steps=5)
    lines = path.read_text().splitlines()
    lines[2] = "\x00\x00garbage"
    path.write_text("\n".join(lines))
    run = read(str(path))
    assert [row["step"] for row in run.rows] == [1, 3, 4, 5]
    assert "line 3 is no JSON: left out" in run.notes[0]


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", steps=6)
    path.write_text(
        path.read_text() + write(tmp_path / "again.jsonl", steps=3).read_text().replace('"step": ', '"step": 1')
    )
    run = read(str(path))
    steps, sent = run.series("flash-comm/wire-bytes")
    assert steps == [1, 2, 3, 4, 5, 6, 11, 12, 13]
    assert [value * 4 / GIB for value in sent] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_repeated_step_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 1, "loss": 5}\n{"step": 2, "b": 1}\n')
    assert read(str(path)).rows == [{"step": 1, "loss": 5}, {"step": 2, "loss": 2, "b": 1}]


def test_a_diverged_loss_stays_visible(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", loss=math.nan)
    what = table.Comparison([read(str(path))], None, "lm loss")
    assert math.isnan(rows(what)["lm loss (mean of the last tenth)"].values[0] or 0)
    assert ">nan" in page.page(what, [])


# ---- folders and other mistakes -------------------------------------------------------------------------------------


def test_a_folder_with_one_file_is_that_run(tmp_path: Path) -> None:
    write(tmp_path / "only.jsonl")
    assert read(str(tmp_path)).name == "only"


def test_a_folder_of_several_runs_lists_them(tmp_path: Path) -> None:
    for name in ("offline-run-1-a", "run-2-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"run-{name[-1]}.wandb").write_bytes(b"")
    with pytest.raises(CannotRead, match="more than one run in this folder: choose offline-run-1-a, run-2-b"):
        read(str(tmp_path))


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match=r"no run in this folder, neither \*\.wandb nor \*\.jsonl"):
        read(str(tmp_path))


def test_a_missing_run_is_refused_by_name() -> None:
    with pytest.raises(CannotRead, match=r"gone\.jsonl: no such file or folder"):
        read("gone.jsonl")


def test_a_file_without_a_step_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"config": {}}\n[1, 2]\n')
    with pytest.raises(CannotRead, match=r"no logged step in it\. .*line 2 is no JSON"):
        read(str(path))


def test_a_run_without_our_metrics_is_compared_by_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, ours = write(tmp_path / "plain.jsonl", ours=False, loss=2.0), write(tmp_path / "ours.jsonl", loss=2.1)
    code, html, said = compare(tmp_path, capsys, plain, ours)
    assert code == 0
    note = "plain: no flash-comm/* metrics, so only its other scalars are compared."
    assert note in said and note in html
    assert "+5.00%" in html and html.count("<svg viewBox") == 2 + len(plots.PLOTS)


def test_runs_of_different_lengths_meet_at_the_shortest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, html, said = compare(tmp_path, capsys, write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", steps=4))
    note = "The runs have different lengths: numbers are taken at step 4, where b ends."
    assert code == 0 and note in said and note in html


def test_a_missing_baseline_costs_the_differences_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, html, said = compare(
        tmp_path, capsys, write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl"), "--baseline", "gone.jsonl"
    )
    assert code == 1
    assert "baseline gone.jsonl: no such file or folder" in said and "choose one with --baseline" in said
    assert "No baseline: no differences are shown." in html and "%</small>" not in html


def test_an_unreadable_run_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, html, said = compare(tmp_path, capsys, write(tmp_path / "a.jsonl"), "gone.jsonl", write(tmp_path / "b.jsonl"))
    assert code == 1 and "gone.jsonl: no such file or folder" in said
    assert "2 training runs" in html and "gone.jsonl" in html


def test_nothing_readable_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, html, said = compare(tmp_path, capsys, "gone.jsonl")
    assert code == 2 and html == "" and said.count("gone.jsonl") >= 1


def test_a_baseline_may_be_named_or_come_on_top(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (write(tmp_path / f"{name}.jsonl", loss=loss) for name, loss in (("a", 2.0), ("b", 4.0), ("c", 1.0)))
    assert "Differences are to b." in compare(tmp_path, capsys, a, b, "--baseline", "b")[1]
    code, html, _ = compare(tmp_path, capsys, a, b, "--baseline", c)
    assert code == 0 and "Differences are to c." in html and "3 training runs" in html and "+300.00%" in html


def test_no_loss_at_all_lists_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl")
    path.write_text(path.read_text().replace("lm loss", "score"))
    code, html, said = compare(tmp_path, capsys, path)
    assert code == 0 and "No run logged a loss: name a scalar with --loss, from " in said and "score" in said
    assert "None of these runs logged what this shows." in html
    assert "score (mean of the last tenth)" in compare(tmp_path, capsys, path, "--loss", "score")[1]


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "run.jsonl"))
    html = compare(tmp_path, capsys, *paths)[1]
    assert all(f"<th>{path}</th>" in html for path in paths)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_final_numbers_are_those_of_the_runs(tmp_path: Path) -> None:
    runs = [
        read(str(write(tmp_path / "base.jsonl", loss=2.0))),
        read(str(write(tmp_path / "b.jsonl", loss=2.5, steps=20))),
    ]
    found = rows(table.Comparison(runs, runs[0], "lm loss"))
    expected = {
        "lm loss (mean of the last tenth)": ([2.0, 2.5], 0.25),
        "GiB sent by a rank": ([2.5, 2.5], 0.0),
        "GiB an exact run sends": ([10, 10], 0.0),
        "compression": ([4, 4], 0.0),
        "steps/s (median)": ([1, 1], 0.0),
        "seconds in collectives": ([1, 1], 0.0),
        "calls deferred": ([20, 20], 0.0),
        "NaN blocks sampled": ([10, 10], 0.0),
        "last step of the run": ([10, 20], 1.0),
    }
    for label, (values, difference) in expected.items():
        assert found[label] == (label, values, [None, difference]), label
    assert found["relative error, row"].values == [pytest.approx(0.05 * 5.5)] * 2


def test_the_last_tenth_is_averaged(tmp_path: Path) -> None:
    run = Run("a", "a", {}, [{"step": step, "loss": float(step)} for step in range(1, 101)])
    assert rows(table.Comparison([run], run, "loss"))["loss (mean of the last tenth)"].values == [95.5]


def test_validation_loss_is_listed_and_training_loss_chosen() -> None:
    run = Run("a", "a", {}, [{"step": 1, "lm loss": 2.0, "lm loss validation": 3.0}])
    assert table.loss_name([run]) == "lm loss"
    assert rows(table.Comparison([run], None, "lm loss"))["lm loss validation (last)"].values == [3.0]


# ---- page, pictures, workspace --------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_no_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = compare(tmp_path, capsys, write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl"))[1]
    for found in re.findall(r"""(?:href|src)\s*=\s*["']([^"']*)|url\(([^)]*)\)""", html):
        assert "".join(found).startswith("#"), found
    assert "<script" not in html and "@import" not in html


def test_names_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = compare(tmp_path, capsys, write(tmp_path / "<b>&x.jsonl"))[1]
    assert "<b>" not in html and "&lt;b&gt;&amp;x" in html


def test_every_plot_is_written_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(tmp_path, capsys, write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl"), "--png")
    for plot in plots.PLOTS:
        assert (tmp_path / f"out-{plot.name}.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, html, said = compare(tmp_path, capsys, write(tmp_path / "a.jsonl"))
    assert code == 2 and html == "" and "pip install 'flashcomm_megatron[plots]'" in said


def test_a_workspace_needs_entity_and_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, html, said = compare(tmp_path, capsys, write(tmp_path / "a.jsonl"), "--wandb", "project")
    assert code == 2 and html == "" and "--wandb project: give entity/project." in said


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    shutil.copy(write(tmp_path / "a.jsonl"), tmp_path / "b.jsonl")
    done = subprocess.run(
        [sys.executable, "-m", "flashcomm_megatron", "compare", "a.jsonl", "b.jsonl"],
        cwd=tmp_path, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.stdout == "wrote compare.html\n" and (tmp_path / "compare.html").exists()
