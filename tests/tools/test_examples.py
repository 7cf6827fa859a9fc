"""The examples that people copy run, and print what they say a user should see."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import forks
import pytest
from patience import patient

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patient(100))


def on_two_ranks(*words: str) -> str:
    """What an example printed on two ranks."""
    ran = forks.python(*words, world=2)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


COPIED = ("generate.py", "pretrain_gpt.sh", "lora.py", "rl.py", "serve.sh", "slurm_two_nodes.sh", "notebook.ipynb")


@pytest.mark.parametrize("name", COPIED)
def test_examples_say_what_one_should_see_and_stand_in_the_first_page(name: str) -> None:
    assert "You should see" in (EXAMPLES / name).read_text()
    assert f"`examples/{name}`" in (ROOT / "docs" / "index.md").read_text()


def test_rl_log_probabilities_are_equal_without_feedback_and_differ_with_it() -> None:
    found = dict(
        re.findall(r"feedback (\w+), step 1: .* difference (\S+)", on_two_ranks("examples/rl.py", "--steps", "1"))
    )
    assert float(found["off"]) == 0.0 and float(found["auto"]) > 0.0


def test_lora_learns_and_is_compressed_in_both_directions() -> None:
    printed = on_two_ranks("examples/lora.py", "--steps", "3", "--flash-comm-bits", "4", "--flash-comm-min-bytes", "0")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    # A step: 8 sums in forward, 7 in backward, for nothing below the first layer's adapter needs its input's gradient.
    assert "compressed 45 of 45 collectives" in printed


def test_the_demo_prints_three_widths_and_what_to_type_next() -> None:
    ran = forks.python("examples/demo.py", "--local", "--documents", "1")
    assert ran.returncode == 0, ran.stderr
    assert re.findall(r"^--- (\d+) bits", ran.stdout, re.M) == ["16", "8", "4"]
    rows = re.findall(r"^ +(\d+) .* MiB", ran.stdout, re.M)
    assert rows == ["16", "8", "4"] and "--flash-comm-bits 8" in ran.stdout.splitlines()[-2]


@pytest.mark.skipif("__import__('torch').cuda.device_count() > 1", reason="here the demo would run on GPUs")
def test_the_demo_says_what_is_missing_for_gpus() -> None:
    ran = forks.python("examples/demo.py", "--gpu")
    assert ran.returncode == 2 and ran.stderr.startswith("make demo GPU=1 needs two GPUs;")


def test_the_notebook_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    errors = names["errors"]
    assert isinstance(errors, dict) and list(errors.values()) == sorted(errors.values())
    assert "projection" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_valid_and_say_how_to_call_them(script: Path) -> None:
    assert run("bash", "-n", str(script)).returncode == 0
    assert run("bash", str(script)).returncode == 2


def test_the_server_gets_the_one_flag(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "run_text_generation_server.py").touch()
    words = ("bash", "examples/serve.sh", str(tmp_path), "CONVERTED", "MODEL", "--temperature", "1")
    line = run(*words, DRY_RUN="1", BITS="6").stdout
    assert "-m flashcomm_megatron" in line and "--flash-comm-bits 6 --temperature 1" in line
    assert "--flash-comm-bits" not in run(*words, DRY_RUN="1", BITS="").stdout


def test_slurm_gets_the_one_flag_on_every_node(tmp_path: Path) -> None:
    for name, text in (("scontrol", "echo first"), ("srun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    line = run("bash", "examples/slurm_two_nodes.sh", "pretrain_gpt.py", "--tensor-model-parallel-size", "16",
               PATH=path, **slurm).stdout  # fmt: skip
    assert "--nnodes 2 --nproc-per-node 8" in line and "--rdzv-endpoint first:29500" in line
    assert line.rstrip().endswith("pretrain_gpt.py --tensor-model-parallel-size 16 --flash-comm-bits 4")
