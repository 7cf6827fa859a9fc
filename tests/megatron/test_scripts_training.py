"""The unmodified pretrain_gpt.py without a GPU: it trains, saves, resumes and evaluates, exactly and compressed.

Needs a checkout of Megatron-LM (see megatron_lm.py).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron_lm import checkout, run, try_scripts
from patience import patient

SCALARS = {"flash-comm/wire-bytes", "flash-comm/exact-bytes", "flash-comm/compression", "flash-comm/quantized-calls"}
TRAIN = try_scripts.TRAIN
pytestmark = pytest.mark.slow


def losses(output: str) -> dict[int, str]:
    """Iteration -> training loss, as printed with seven digits."""
    found = re.findall(r"iteration +(\d+)/.*? lm loss: (\S+)", output)
    return {int(step): loss for step, loss in found}


def evaluated(output: str) -> list[str]:
    return re.findall(r"lm loss value: (\S+)", output)


@pytest.fixture(scope="module", params=[[], ["--sequence-parallel"]], ids=["tp", "sp"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An exact run, and an 8-bit one that saved a checkpoint after iteration 3 and wrote both kinds of logs."""
    folder = tmp_path_factory.mktemp("run")
    saved = ["--save", str(folder / "saved"), "--save-interval", "3"]
    logs = ["--tensorboard-dir", str(folder / "tb"), "--flash-comm-metrics", str(folder / "run.jsonl")]
    exact = run("pretrain_gpt.py", *TRAIN, *request.param)
    eight = run("pretrain_gpt.py", *TRAIN, *request.param, *try_scripts.EIGHT_BITS, *saved, *logs)
    for ran in (exact, eight):
        assert ran.returncode == 0, ran.stderr[-3000:]
    said = eight.stdout + eight.stderr  # Megatron sets up logging, from 0.19 on to stderr
    return {"exact": exact.stdout, "eight": eight.stdout, "said": said, "folder": folder, "options": request.param}


def test_compressed_losses_track_the_exact_ones(runs: dict[str, Any]) -> None:
    exact, eight = losses(runs["exact"]), losses(runs["eight"])
    assert list(exact) == list(eight) == [1, 2, 3, 4, 5, 6]
    assert float(exact[6]) < float(exact[1]) - 0.1
    assert exact != eight
    for step in exact:
        assert float(eight[step]) == pytest.approx(float(exact[step]), rel=1e-3), step
    # Evaluated after iterations 3 and 6, then on the validation and the test set.
    assert len(evaluated(runs["exact"])) == len(evaluated(runs["eight"])) == 4


def test_start_and_closing_line_once(runs: dict[str, Any]) -> None:
    assert runs["said"].count("flash-comm: 8-bit auto") == 1
    closing = re.findall(r"flash-comm: compressed (\d+) of (\d+) collectives; .*\((.*)x\)$", runs["said"], re.M)
    assert len(closing) == 1
    compressed, calls, ratio = closing[0]
    assert compressed == calls and 3.5 < float(ratio) < 4  # float32 in 8 bits and a little
    assert "flash-comm:" not in runs["exact"]


def test_scalars_are_in_both_logs(runs: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, *lines = map(json.loads, (runs["folder"] / "run.jsonl").read_text().splitlines())
    assert first["config"]["flash-comm"]["bits"] == 8
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    printed = losses(runs["eight"])
    # What Megatron prints second is the mean of the first two.
    assert all(f"{line['lm loss']:.6E}" == printed[line["step"]] for line in lines if line["step"] != 2)
    board = EventAccumulator(str(runs["folder"] / "tb"))
    board.Reload()
    assert set(board.Tags()["scalars"]) >= SCALARS
    wire = [event.value for event in board.Scalars("flash-comm/wire-bytes")]
    assert wire == [line["flash-comm/wire-bytes"] for line in lines] and wire[0] > 0


def test_the_checkpoint_resumes_to_the_same_bits(runs: dict[str, Any]) -> None:
    saved = ["--load", str(runs["folder"] / "saved"), "--ckpt-step", "3"]
    resumed = run("pretrain_gpt.py", *TRAIN, *runs["options"], *try_scripts.EIGHT_BITS, *saved)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert list(losses(resumed.stdout)) == [4, 5, 6]
    assert losses(resumed.stdout)[4] == losses(runs["eight"])[4]
    assert losses(resumed.stdout)[6] == losses(runs["eight"])[6]
    first, *later = evaluated(resumed.stdout)  # the first evaluation of a process measures and has no feedback yet
    assert later == evaluated(runs["eight"])[2:]
    assert float(first) == pytest.approx(float(evaluated(runs["eight"])[1]), rel=1e-4)


@pytest.mark.parametrize("runs", [[]], ids=["tp"], indirect=True)
def test_the_kill_switch_gives_the_exact_bits(runs: dict[str, Any]) -> None:
    """With the flag and the switch nothing of ours may run, so nothing may differ from the run without the flag."""
    killed = run("pretrain_gpt.py", *TRAIN, *try_scripts.EIGHT_BITS, FLASH_COMM_DISABLE="1")
    assert killed.returncode == 0, killed.stderr[-3000:]
    assert losses(killed.stdout) == losses(runs["exact"])
    assert evaluated(killed.stdout) == evaluated(runs["exact"])


SMALL = "from megatron.training.arguments import parse_args\nprint(parse_args().flash_comm_bits)\n"


@pytest.mark.parametrize("strict", [False, True])
def test_a_script_without_tensor_parallel_layers_is_warned(tmp_path: Path, strict: bool) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    ran = alone(str(tmp_path / "small.py"), *try_scripts.EIGHT_BITS, *["--flash-comm-strict"] * strict)
    assert "8\n" in ran.stdout
    warning = "flash-comm is on (8-bit) but no tensor-parallel layer ran, so nothing was compressed."
    assert warning in ran.stdout + ran.stderr  # Megatron moves the log to stdout
    assert ran.returncode == strict and "Traceback" not in ran.stderr


def test_what_needs_a_gpu_is_one_sentence() -> None:
    ran = alone("pretrain_gpt.py", *TRAIN, "--transformer-impl", "transformer_engine")
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert ran.stderr.endswith("Transformer Engine's layers need a GPU: leave --transformer-impl out.\n")


def alone(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """One rank without torchrun."""
    folder = checkout()
    line = [sys.executable, "-m", "flashcomm_megatron", "--cpu", script, *options]
    surroundings = try_scripts.environment(folder)
    return subprocess.run(line, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=patient(120))
