"""Run any script with the ``--flash-comm-*`` flags available, or one of the package's own commands.

    torchrun --nproc-per-node 8 -m flashcomm_megatron pretrain_gpt.py ... --flash-comm-bits 4
    torchrun --nproc-per-node 2 -m flashcomm_megatron --cpu pretrain_gpt.py ... --flash-comm-bits 4
    python -m flashcomm_megatron report                what was found; --json for programs
    python -m flashcomm_megatron plan --gpu L40 --tp 8 --model llama-3-70b
    python -m flashcomm_megatron accuracy --model DIR --text FILE --tp 8 --bits 8,6,4
    python -m flashcomm_megatron compare exact.jsonl flash-4.jsonl
    torchrun --nproc-per-node 8 -m flashcomm_megatron bench --tune tuned.json
    torchrun --nproc-per-node 8 -m flashcomm_megatron calibrate pretrain_gpt.py ... --out ranges.safetensors
    python -m flashcomm_megatron --version

The script runs as ``__main__`` with its own arguments and its own folder first on ``sys.path``, as if python had been
given its path, or ``-m`` and its name; the import of this package is all that is added. ``--cpu``, before the script,
lets it run over gloo on a machine with no GPU.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable

from . import cpu
from .config import check_environment
from .megatron import coverage
from .megatron.patching import PatchError
from .tools.accuracy import main as accuracy
from .tools.calibrate import main as calibrate
from .tools.compare.command import main as compare
from .tools.plan.command import main as plan
from .tools.report import main as report
from .tools.tune import main as bench
from .version import __version__

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "report": report,
    "accuracy": accuracy,
    "calibrate": calibrate,
    "compare": compare,
    "plan": plan,
    "bench": bench,
}


def main(argv: list[str]) -> int:
    """Exit code of the command, or of the script, in ``argv``."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nCommands: {', '.join(COMMANDS)}; each has --help with an example.")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"flashcomm_megatron {__version__}")
        return 0
    try:
        check_environment()
    except ValueError as error:
        return _refuse(str(error))
    on_cpu = argv[0] == "--cpu"
    if argv[on_cpu:] in ([], ["-m"]):
        return _refuse(f"{argv[-1]}: nothing after it: give a script's path, or -m and a module, and its arguments.")
    name, *rest = argv[on_cpu:]
    return _command(name, rest) if name in COMMANDS and not on_cpu else run(name, rest, on_cpu)


def _command(name: str, argv: list[str]) -> int:
    try:
        code = COMMANDS[name](argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # nobody reads on, as in ``report | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def run(script: str, argv: list[str], on_cpu: bool = False) -> int:
    """Run ``script`` (a path, or ``-m`` and a module in ``argv``) with its arguments, without a GPU if asked to."""
    if script != "-m" and not os.path.exists(script):
        commands = ", ".join(COMMANDS)
        return _refuse(f"{script}: no such file, and no command: choose {commands} or a script's path.")
    left: SystemExit | None = None
    try:
        _execute(script, argv, on_cpu)
    except (cpu.NeedsGPU, PatchError) as error:
        return _refuse(str(error))
    except SystemExit as error:  # whatever its code, the verdict holds
        left = error
    try:
        coverage.ignored(argv)
        coverage.close()
    except RuntimeError as error:
        own = left.code if left is not None else None
        return _refuse(str(error), own if isinstance(own, int) and own else 1)
    if left is not None:
        raise left
    return 0


def _execute(script: str, argv: list[str], on_cpu: bool) -> None:
    is_module = script == "-m"
    sys.argv = argv if is_module else [script, *argv]
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.abspath(script))
    if on_cpu:
        cpu.enable(force=True, scripts=True)
    if is_module:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")


def _refuse(sentence: str, code: int = 2) -> int:
    print(f"flashcomm_megatron: error: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
