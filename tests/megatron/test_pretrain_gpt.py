"""examples/pretrain_gpt.sh: valid shell, the one flag, refusals, and options that Megatron-LM's own parser takes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_gpt.sh"
PARSE = (
    "import sys; sys.path.insert(0, '.')\n"
    "from flashcomm_megatron import cpu, seams; cpu.enable(force=True, scripts=True); seams.install = list\n"
    "from megatron.training.arguments import parse_args, validate_args\n"
    "args = parse_args(); validate_args(args)\n"
    "print(args.flash_comm_bits, args.tensor_model_parallel_size, args.train_iters, args.seed)"
)


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script run with nothing of the caller's environment but the path."""
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> str:
    """A folder that looks like a checkout."""
    (tmp_path / "pretrain_gpt.py").touch()
    return str(tmp_path)


def test_the_script_is_valid_shell() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


def test_the_one_flag_and_ones_own_options_come_last(checkout: str) -> None:
    words = shlex.split(script(checkout, "--seed", "5", DRY_RUN="1", TP="4").stdout)
    assert words[:6] == ["torchrun", "--nproc-per-node", "4", "-m", "flashcomm_megatron", f"{checkout}/pretrain_gpt.py"]
    assert words[-4:] == ["--flash-comm-bits", "4", "--seed", "5"]
    assert words[words.index("--tensor-model-parallel-size") + 1] == "4"


def test_without_bits_there_is_no_flag_and_only_the_folder_differs(checkout: str) -> None:
    exact = script(checkout, DRY_RUN="1", BITS="").stdout
    compressed = script(MEGATRON_LM=checkout, DRY_RUN="1", BITS="6").stdout
    assert compressed.replace(" --flash-comm-bits 6", "").replace("runs/6", "runs/exact") == exact


def test_a_users_text_and_cpu_mode_reach_the_command(checkout: str) -> None:
    words = script(checkout, DRY_RUN="1", CPU="1", DATA="my text", VOCAB="v.json", MERGES="m.txt").stdout
    assert "-m flashcomm_megatron --cpu " in words and "--mock-data" not in words
    assert shlex.split(words)[shlex.split(words).index("--data-path") + 1] == "my text"


def test_a_folder_without_megatron_is_refused(tmp_path: Path) -> None:
    ran = script(str(tmp_path))
    assert ran.returncode == 2 and "holds no pretrain_gpt.py: give the path of a Megatron-LM checkout" in ran.stderr


def test_megatrons_own_parser_takes_the_options() -> None:
    checkout = os.environ.get("MEGATRON_LM")
    if not checkout:
        pytest.skip("MEGATRON_LM names no Megatron-LM checkout")
    words = shlex.split(script(checkout, "--seed", "5", DRY_RUN="1", TP="2").stdout)
    options = words[words.index(f"{checkout}/pretrain_gpt.py") + 1 :]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", PARSE, *options], cwd=checkout, env=environment, capture_output=True, text=True
    )
    if "ModuleNotFoundError" in ran.stderr:
        pytest.skip(f"the checkout's own dependencies are missing: {ran.stderr.splitlines()[-1]}")
    assert ran.stdout.splitlines()[-1:] == ["4 2 20000 5"], ran.stderr
