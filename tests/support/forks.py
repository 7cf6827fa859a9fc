"""Processes forked from one that has imported torch, instead of fresh interpreters: command lines and ranks of tests.

A fresh interpreter takes seconds to import torch and what Megatron asks of it; a forked one takes none. Otherwise a
command line run here is like one of a fresh interpreter: its own ``__main__``, ``sys.argv``, ``sys.path``, environment,
folder, output and exit code, and neither this package nor Megatron is imported in it. What only a fresh interpreter
does, such as ``sitecustomize``, is tested by ``subprocess``.

``serve`` is what is forked: three processes, each with more modules than the one before. A request is a connection to
one's socket: a line of JSON, with the files for output. Exit codes come back as lines; who hangs up kills what runs.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from patience import Deadline

ROOT = Path(__file__).resolve().parents[2]
FRESH, RANKS, MEGATRON = "fresh", "ranks", "megatron"
PRELOADED = {
    FRESH: ("torch.distributed.run", "torch._inductor.compile_fx", "torch.distributed.tensor",
            "torch.distributed.checkpoint", "wandb", "matplotlib.figure", "pytest", "hypothesis.strategies"),
    RANKS: ("flashcomm_megatron.__main__",),
    MEGATRON: ("megatron.core.models.gpt", "megatron.core.models.gpt.gpt_layer_specs", "megatron.core.optimizer",
               "megatron.core.pipeline_parallel"),
}  # fmt: skip
ADDRESS = "FLASHCOMM_TEST_FORKS"  # the variable that names the folder of sockets which several processes share

# ---- asking --------------------------------------------------------------------------------------------------------


def python(
    *words: str, world: int = 0, folder: Path | str = ROOT, seconds: float = 180, **variables: str
) -> subprocess.CompletedProcess[str]:
    """What ``python WORDS`` (a script, ``-m`` and a module, ``-c`` and a source) prints and returns.

    ``world`` > 0: as many processes with torchrun's variables and one output; the first that fails ends the others.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    if world:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    request = {"words": words, "folder": str(folder), "environment": environment, "together": True}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        codes = run(FRESH, request, max(world, 1), Deadline(seconds), (out.fileno(), err.fileno()))
        printed = [file.read().decode() for file in (out, err) if file.seek(0) == 0]
    if None in codes.values():
        raise subprocess.TimeoutExpired(words, seconds, *printed)
    return subprocess.CompletedProcess(words, next(filter(None, codes.values()), 0), *printed)


def run(
    kind: str, request: dict[str, Any], world: int, deadline: Deadline, files: tuple[int, int] = (1, 2)
) -> dict[int, int | None]:
    """Exit codes by rank, first those that ended first; None: it was killed at the deadline."""
    codes: dict[int, int | None] = {}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"{sockets()}/{kind}")
        socket.send_fds(server, [json.dumps(request | {"world": world}).encode() + b"\n"], files)
        with server.makefile() as lines:
            while len(codes) < world and deadline.left():
                if select.select([server], [], [], min(1.0, deadline.left()))[0]:
                    line = lines.readline()
                    assert line, "the server of forked processes has gone"
                    rank, code = map(int, line.split())
                    codes[rank] = code
            server.shutdown(socket.SHUT_WR)
            lines.read()
    return codes | {rank: None for rank in range(world) if rank not in codes}


def sockets() -> str:
    """The folder of the servers' sockets; they are started where there are none."""
    return os.environ.get(ADDRESS) or _started()[0].name


@lru_cache(None)
def _started() -> tuple[tempfile.TemporaryDirectory[str], Any]:
    """Servers that live as long as this process: their folder, and the one that was started."""
    folder = tempfile.TemporaryDirectory()
    command = [sys.executable, __file__, folder.name]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    while not os.path.exists(f"{folder.name}/{MEGATRON}"):
        assert server.poll() is None, "the server of forked processes did not start"
        time.sleep(0.01)
    return folder, server


# ---- the servers ---------------------------------------------------------------------------------------------------


def serve(folder: str) -> None:
    """Answer every connection in a process of its own, until whoever started this one has gone."""
    listeners = {kind: socket.socket(socket.AF_UNIX) for kind in PRELOADED}
    for kind, listener in listeners.items():
        listener.bind(f"{folder}/{kind}.new")
        listener.listen(64)
        os.rename(f"{folder}/{kind}.new", f"{folder}/{kind}")  # from now on connections wait
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # a command line has a PYTHONPATH of its own
    sys.path[:] = [path for path in sys.path[1:] if path not in given]
    for kind, names in PRELOADED.items():
        sys.path[:0] = [str(ROOT)] * (kind == RANKS)
        with contextlib.redirect_stderr(None):  # Megatron warns of what is not installed
            for name in names:
                with contextlib.suppress(Exception):  # what fails here fails again where it is used
                    importlib.import_module(name)
        gc.freeze()  # collections in what is forked leave what is shared alone
        listener = listeners[kind]
        if kind == MEGATRON or os.fork() == 0:
            break
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(connection)
            os._exit(0)
        connection.close()
    os._exit(0)


def _answer(connection: socket.socket) -> None:
    """Run what is asked for; of what runs together the first that fails ends the others, and who hangs up all."""
    asked, files, *_ = socket.recv_fds(connection, 1 << 16, 2)
    while not asked.endswith(b"\n"):
        asked += connection.recv(1 << 16)
    request, running, heard = json.loads(asked), {}, [connection]
    for rank in range(request["world"]):
        if (pid := os.fork()) == 0:
            connection.close()
            _become(request, rank, files)
        running[os.pidfd_open(pid)] = rank, pid
    while running:
        for ended in select.select([*heard, *running], [], [])[0]:
            if ended is connection:
                heard, code = [], -signal.SIGKILL
            else:
                rank, pid = running.pop(ended)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    connection.sendall(f"{rank} {code}\n".encode())
            for _, pid in running.values() if code and (request["together"] or not heard) else ():
                os.kill(pid, signal.SIGKILL)


def _become(request: dict[str, Any], rank: int, files: list[int]) -> NoReturn:
    """Be the process that was asked for, as far as a fresh interpreter is one, to its end."""
    for stream, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
        os.dup2(file, stream)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if os.environ.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    code = 0
    try:
        if "call" in request:
            sys.path[:] = request["path"]
            importlib.import_module("ranks").run(rank, **request["call"])
        else:
            _run(request["words"], rank)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        ours = error.__traceback__  # two frames: here and in _run
        sys.excepthook(type(error), error, ours and ours.tb_next and ours.tb_next.tb_next)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    if code == -signal.SIGINT:  # as the interpreter itself does
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _run(words: list[str], rank: int) -> None:
    """Run them as ``__main__``."""
    if "WORLD_SIZE" in os.environ:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    first, *rest = words
    folder = os.path.dirname(os.path.abspath(first)) if first not in ("-m", "-c") else os.getcwd()
    sys.path[:0] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    importlib.invalidate_caches()
    sys.argv, sys.orig_argv = words, [sys.executable, *words]
    if first == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], vars(main))
    else:
        main.__file__ = first
        exec(compile(Path(first).read_bytes(), first, "exec"), vars(main))


if __name__ == "__main__":
    serve(sys.argv[1])
