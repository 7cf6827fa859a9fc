"""Comparing runs: what is read, what the table says, and what happens to runs that are damaged, foreign or absent."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import forks
import pytest

from flashcomm_megatron.tools.compare import command, page, plots, table
from flashcomm_megatron.tools.compare.headline import headline
from flashcomm_megatron.tools.compare.runs import CannotRead, Run, read

GIB, ALL = 2**30, len(plots.PLOTS)


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


def compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *args: object, figures: int = 1
) -> tuple[int, str, str]:
    """(exit code, the page, what was said on stderr); with the first figures only, which take most of the time."""
    out = tmp_path / "out.html"
    with mock.patch.object(plots, "PLOTS", plots.PLOTS[:figures]):
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


@pytest.mark.parametrize(
    ("files", "name", "sentence"),
    [
        ({"offline-run-1-a/run-a.wandb": "", "run-2-b/run-b.wandb": ""}, "",
         "more than one run in this folder: choose offline-run-1-a, run-2-b"),
        ({}, "", r"no run in this folder, neither \*\.wandb nor \*\.jsonl"),
        ({}, "gone.jsonl", r"gone\.jsonl: no such file or folder"),
        ({"other.jsonl": '{"config": {}}\n[1, 2]\n'}, "other.jsonl", r"no logged step in it\. .*line 2 is no JSON"),
    ],
    ids=["several runs", "no run", "nothing", "no step"],
)  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path: Path, files: dict[str, str], name: str, sentence: str) -> None:
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    with pytest.raises(CannotRead, match=sentence):
        read(str(tmp_path / name))


def test_a_run_without_our_metrics_is_compared_by_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, ours = write(tmp_path / "plain.jsonl", ours=False, loss=2.0), write(tmp_path / "ours.jsonl", loss=2.1)
    code, html, said = compare(tmp_path, capsys, plain, ours, figures=ALL)
    assert code == 0
    note = "plain: no flash-comm/* metrics, so only its other scalars are compared."
    assert note in said and note in html
    assert "+5.00%" in html and html.count("<svg viewBox") == 2 + len(plots.PLOTS)


def test_runs_of_different_lengths_meet_at_the_shortest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, html, said = compare(tmp_path, capsys, write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", steps=6))
    note = "The runs have different lengths: numbers are taken at step 6, where b ends."
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
    assert all(f'<th title="{path}">{plots.short(str(path))}</th>' in html for path in paths)


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
        "GiB an exact run sends": ([10, 10], None),
        "compression": ([4, 4], None),
        "steps/s (median)": ([1, 1], 0.0),
        "seconds in collectives": ([1, 1], 0.0),
        "calls deferred": ([20, 20], None),
        "NaN blocks sampled": ([10, 10], None),
        "last step of the run": ([10, 20], None),
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


# ---- what won -------------------------------------------------------------------------------------------------------


def made(name: str, sent: float, loss: float, seconds: float, steps: int = 10, bits: int | None = 4) -> Run:
    """A run that sends ``sent`` bytes and takes ``seconds`` a step."""
    return Run(
        name, name, {"bits": bits} if bits else {},
        [{"step": s, "time": seconds * s, "lm loss": loss, "flash-comm/wire-bytes": sent * s}
         for s in map(float, range(1, steps + 1))],
    )  # fmt: skip


EXACT = made("exact", 2900, 2.0, 1.9, bits=None)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (made("a", 1000, 2.0002, 1.0), "4 bits: 2.9x fewer bytes, loss +0.01 %, steps 1.9x faster."),
        (made("a", 5800, 1.998, 3.8), "4 bits: 2.0x more bytes, loss -0.10 %, steps 2.0x slower."),
        (made("a", 2900, 2.0, 1.9, bits=None), "a: as many bytes, loss +0.00 %, steps as fast."),
        (made("a", 1000, math.nan, 1.0), "4 bits: 2.9x fewer bytes, loss is not finite, steps 1.9x faster."),
        (
            made("a", 1000, 2.2, 1.0, steps=4),
            "4 bits: 2.9x fewer bytes, loss +10.00 %, steps 1.9x faster (until step 4, where it ended).",
        ),
    ],
)
def test_one_run_beside_the_baseline_is_said_in_words(run: Run, says: str) -> None:
    assert headline(table.Comparison([EXACT, run], EXACT, "lm loss")) == says


def test_of_several_runs_the_best_of_each_kind_are_named() -> None:
    """The crashed run would win all three; it is left out and said so."""
    runs = [
        EXACT, made("slim", 500, 2.2, 1.5), made("good", 2000, 2.002, 1.6), made("fast", 900, 2.1, 1.0),
        made("crashed", 1, 1.0, 0.1, steps=3),
    ]  # fmt: skip
    assert headline(table.Comparison(runs, EXACT, "lm loss")) == (
        "Of 3 runs that did not end early beside exact: slim sends the fewest bytes (5.8x fewer), "
        "good has the lowest loss (+0.10 %), fast is the fastest (1.9x faster)."
    )


def test_without_a_baseline_nothing_won() -> None:
    assert headline(table.Comparison([EXACT], EXACT, "lm loss")) == ""
    assert headline(table.Comparison([EXACT, made("a", 1, 2.0, 1.0)], None, "lm loss")) == ""


def test_a_baseline_that_counted_no_bytes_is_compared_by_what_an_exact_run_sends(tmp_path: Path) -> None:
    plain, ours = write(tmp_path / "plain.jsonl", ours=False), write(tmp_path / "ours.jsonl")
    runs = [read(str(plain)), read(str(ours))]
    assert (
        headline(table.Comparison(runs, runs[0], "lm loss")) == "4 bits: 4.0x fewer bytes, loss +0.00 %, steps as fast."
    )


def test_a_crashed_run_leaves_the_others_numbers_at_their_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (write(tmp_path / f"{name}.jsonl", steps=steps) for name, steps in (("a", 20), ("b", 20), ("c", 3)))
    _, html, said = compare(tmp_path, capsys, a, b, c)
    assert "c ended early (crashed?): its numbers stand at step 3, its last" in said and "at step 3" in html
    runs = [read(str(path)) for path in (a, b, c)]
    sent = rows(table.Comparison(runs, runs[0], "lm loss"))["GiB sent by a rank"]
    assert sent.values == [5.0, 5.0, 0.75] and sent.differences == [None, 0.0, 0.0]


@pytest.mark.parametrize("count", [2, 5, 12])
def test_a_page_of_many_runs_with_long_names(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every run stands in the legend by its whole name, in both tables, and in every figure; the last one crashed."""
    names = [f"run-{i:02}-{'very-' * (i % 3 * 12)}long-name" for i in range(count)]
    paths = [
        write(tmp_path / f"{name}.jsonl", steps=3 if i == count - 1 else 10, loss=2 + i / 100)
        for i, name in enumerate(names)
    ]
    code, html, said = compare(tmp_path, capsys, *paths, figures=ALL)
    first = re.search(r"<h1>(.*?)</h1>", html)
    assert (
        code == 0 and first and first[1].startswith("4 bits: " if count == 2 else f"Of {count - 2} runs that did not")
    )
    assert f"{names[-1]} ended early" in said
    legend = re.findall(r"<li><svg.*?</svg>(.*?)</li>", html)
    assert legend == names
    assert all(html.count(f'<th title="{name}">{plots.short(name)}</th>') == 2 for name in names)
    figures = re.findall(r"<figure id=.*?</figure>", html, re.S)
    assert len(figures) == len(plots.PLOTS)
    for figure in figures:
        colours = {plots.style(i).colour.lower().replace(plots.INK, "currentcolor") for i in range(count)}
        assert all(colour in figure.lower() for colour in colours)
    looks = [plots.style(i) for i in range(count)]
    assert len(set(looks)) == count


def test_every_axis_has_a_unit(tmp_path: Path) -> None:
    runs = [read(str(write(tmp_path / f"{name}.jsonl"))) for name in "ab"]
    for plot in plots.PLOTS:
        axis = plots.draw(plot, table.Comparison(runs, runs[0], "lm loss"), legend=False).axes[0]
        assert axis.get_xlabel() in ("step", "kind of layer") or axis.get_xlabel().endswith(")")
        assert axis.get_ylabel().endswith(")"), plot.name


# ---- page, pictures, workspace --------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_no_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = compare(tmp_path, capsys, write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl"), figures=ALL)[1]
    for found in re.findall(r"""(?:href|src)\s*=\s*["']([^"']*)|url\(([^)]*)\)""", html):
        assert "".join(found).startswith("#"), found
    assert "<script" not in html and "@import" not in html


def test_names_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = compare(tmp_path, capsys, write(tmp_path / "<b>&x.jsonl"))[1]
    assert "<b>" not in html and "&lt;b&gt;&amp;x" in html


def test_every_plot_is_written_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(tmp_path, capsys, write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl"), "--png", figures=ALL)
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
    done = forks.python("-m", "flashcomm_megatron", "compare", "a.jsonl", "b.jsonl", folder=tmp_path)
    assert done.stdout == "4 bits: as many bytes, loss +0.00 %, steps as fast.\nwrote compare.html\n"
    assert (tmp_path / "compare.html").exists()
