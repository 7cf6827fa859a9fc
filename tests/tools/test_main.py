"""``python -m flashcomm_megatron SCRIPT``: the script runs as if python had been given its path, with our flags."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import forks
import pytest
from patience import patient

from flashcomm_megatron.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
WARNING = "flash-comm is on (4-bit) but no tensor-parallel layer ran"
OWN_PARSER = """
import argparse
import flashcomm_megatron as fc
from flashcomm_megatron.megatron import coverage, installation
installation.install = lambda *options: coverage.start("0 names patched")
arguments = fc.add_arguments(argparse.ArgumentParser()).parse_args()
print("bits", arguments.flash_comm_bits)
"""


def run(script: Path | str, *args: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m flashcomm_megatron SCRIPT ARGS`` from ``folder``."""
    return forks.python("-m", "flashcomm_megatron", str(script), *args, folder=folder, **variables)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "train.py"


def test_the_script_is_main_with_its_arguments_and_its_siblings(script: Path) -> None:
    (script.parent / "gpt_builders.py").write_text("name = 'sibling'\n")
    script.write_text(
        "import sys, gpt_builders\n"
        "print(__name__, gpt_builders.name, sys.path[0], sys.argv, sys.modules['__main__'].__file__, sep='\\n')\n"
    )
    ran = run("train.py", "--lr", "1", folder=script.parent)
    folder = str(script.parent)
    assert ran.stdout.splitlines() == ["__main__", "sibling", folder, "['train.py', '--lr', '1']", "train.py"], (
        ran.stderr
    )


def test_exit_codes_and_errors_are_the_scripts(script: Path) -> None:
    script.write_text("import sys; sys.exit(3)")
    assert run(script).returncode == 3
    script.write_text("raise ValueError('of the script')")
    ran = run(script)
    assert ran.returncode == 1 and ran.stderr.endswith("ValueError: of the script\n")


def test_nobody_has_to_read_a_command_to_its_end() -> None:
    words = f"{sys.executable} -m flashcomm_megatron plan --gpu L40 --tp 8 --model llama-3-70b"
    command = ["bash", "-c", f"{words} | head -1; exit ${{PIPESTATUS[0]}}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patient(180))
    assert ran.stdout.startswith("L40, TP8, llama-3-70b") and "BrokenPipe" not in ran.stderr
    assert ran.returncode in (0, 141)  # 0 where the pipe took it all at once


def test_flags_reach_a_script_with_its_own_parser(script: Path) -> None:
    script.write_text(OWN_PARSER)
    on = run(script, "--flash-comm-bits", "4")
    assert on.returncode == 0 and on.stdout == "bits 4\n"
    assert WARNING in on.stderr  # it never ran a layer
    strict = run(script, "--flash-comm-strict", "--flash-comm-bits", "4")
    assert strict.returncode == 1 and WARNING in strict.stderr and "Traceback" not in strict.stderr
    wrong = run(script, "--flash-comm-bits", "9")
    assert wrong.returncode == 2 and wrong.stderr.endswith("error: --flash-comm-bits 9: choose 2 to 8.\n")
    off = run(script)
    assert off.returncode == 0 and off.stdout == "bits None\n" and off.stderr == ""


def test_an_imported_package_warns_at_exit_too(script: Path) -> None:
    script.write_text(OWN_PARSER)
    ran = forks.python(str(script), "--flash-comm-bits", "4")
    assert ran.returncode == 0 and ran.stderr.count(WARNING) == 1


def test_a_flag_that_nobody_reads_is_loud(script: Path) -> None:
    script.write_text("import argparse; print(argparse.ArgumentParser().parse_known_args()[1])")
    ran = run(script, "--flash-comm-bits", "4")
    assert "the script did not read --flash-comm-bits" in ran.stderr
    assert "add_arguments" in ran.stderr
    assert run(script, "--other").stderr == ""
    assert ran.returncode == 0 and run(script, "--flash-comm-bits", "4", "--flash-comm-strict").returncode == 1


def test_a_wrong_path_is_one_sentence() -> None:
    ran = run("no/such_script.py", "--flash-comm-bits", "4")
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("flashcomm_megatron: error: no/such_script.py: no such file, and no command: choose ")
    assert ran.stderr.endswith(" or a script's path.\n") and ran.stderr.count("\n") == 1


def test_an_unknown_variable_is_refused_at_start(script: Path) -> None:
    script.write_text("print('ran')")
    ran = run(script, FLASH_COMM_WIDTH="4")
    assert ran.returncode == 2 and ran.stdout == "" and "FLASH_COMM_WIDTH is no variable of flash-comm" in ran.stderr


def test_without_a_script_the_usage_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert capsys.readouterr().out.count("torchrun --nproc-per-node 8 -m flashcomm_megatron pretrain_gpt.py") == 2
