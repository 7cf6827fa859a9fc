"""The report: readable with and without Megatron, and true about what is in force."""

from __future__ import annotations

import sys

import forks
import pytest
import torch
from specification import planned

import flashcomm_megatron as fc
from flashcomm_megatron import config
from flashcomm_megatron.__main__ import main
from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.megatron import feedback, seams
from flashcomm_megatron.observe import counters


def test_the_report_works_without_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    found = fc.report()
    assert found["megatron-core"].startswith("none (") and found["seams"] == []
    assert "none without Megatron" in str(found)
    assert str(found).splitlines()[0].split() == ["flashcomm_megatron", fc.__version__]


def test_the_report_says_what_is_on_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    monkeypatch.delenv("FLASH_COMM_DISABLE", raising=False)
    assert fc.report()["state"] == "off"
    config.set_current(fc.Config(bits=4))
    assert fc.report()["state"].startswith("on, Config(bits=4")
    config.set_current(None)
    monkeypatch.setenv("FLASH_COMM_DISABLE", "1")
    found = fc.report()
    assert found["state"] == "off, FLASH_COMM_DISABLE is set"
    assert "FLASH_COMM_DISABLE=1" in found["environment"]


def test_it_says_where_feedback_was_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    counters.reset_stats()
    assert fc.report()["feedback"] == "no sum so far"
    layer = torch.nn.Linear(2, 2).train()
    plan = planned("all_reduce", torch.zeros(1, 2), 2, fc.Config(bits=4, min_bytes=0))
    assert feedback.residuals(layer, torch.zeros(1, 2), None, plan) is None
    assert fc.stats()["feedback"] == {"training": 1}
    assert fc.report()["feedback"] == "1 x training"
    counters.reset_stats()


def test_transports_are_those_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    for cuda, available, named in ((object(), True, "peer, host, shared-memory, group"),
                                   (None, True, "shared-memory, group"),
                                   (None, False, "group")):  # fmt: skip
        monkeypatch.setattr(extension, "cuda", lambda cuda=cuda: cuda)
        monkeypatch.setattr(extension, "available", lambda available=available: available)
        assert fc.report()["transports"] == named


def test_it_prints_no_warnings_of_megatrons() -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    ran = forks.python("-c", "import flashcomm_megatron as fc; fc.report()")
    assert ran.returncode == 0 and "Warning" not in ran.stderr, ran.stderr


def test_every_seam_fits_the_installed_megatron() -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    found = fc.report()
    states = dict(found["seams"])
    assert all(states[seam.path].startswith("fits") for seam in (*seams.SEAMS, *seams.TOKENS))
    assert all(seam.path in str(found) and seam.why for seam in seams.SEAMS)


def test_the_command_prints_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    assert main(["report"]) == 0
    assert capsys.readouterr().out == f"{fc.report()}\n"
    with pytest.raises(SystemExit) as ended:
        main(["report", "--verbose"])
    assert ended.value.code == 2 and "unrecognized arguments: --verbose" in capsys.readouterr().err
