"""CPU mode for whole scripts: each row does what it says, importing alone does nothing, disable() restores everything.

Needs torch and the megatron-core package; real scripts run in test_scripts_*.py.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import torch

from flashcomm_megatron import cpu
from flashcomm_megatron.cpu import backends, literals, options
from flashcomm_megatron.megatron import patching


def bound(seam: patching.Seam) -> Any:
    """The object that a row's name is bound to."""
    return patching.find(seam)[2]


def everything() -> dict[str, Any]:
    """All that CPU mode changes: the rows that exist here, the modes, the finders, the environment."""
    rows = [*cpu.SCRIPT_SEAMS, *cpu.SEAMS, *backends.present()]
    return {seam.path: bound(seam) for seam in rows} | {
        "modes": list(torch.overrides._get_current_function_mode_stack()),
        "finders": list(sys.meta_path),
        "environment": dict(os.environ),
    }


@pytest.fixture
def on() -> Iterator[None]:
    cpu.enable(force=True, scripts=True)
    yield
    cpu.disable()


def test_disable_restores_every_object() -> None:
    cpu.disable()
    before = everything()
    for _ in range(2):
        assert cpu.enable(force=True, scripts=True) and cpu.is_on()
    during = everything()
    same = [name for name in before if before[name] is during[name] or before[name] == during[name]]
    unchanged = {"environment"} if "CUDA_DEVICE_MAX_CONNECTIONS" in os.environ else set()
    assert set(same) <= unchanged | ({"finders"} if importlib.util.find_spec("triton") else set())
    for _ in range(2):
        cpu.disable()
    after = everything()
    changed = [name for name in before if before[name] is not after[name] and before[name] != after[name]]
    assert not changed and not cpu.is_on()


def test_rows_say_why_and_stand_once() -> None:
    rows = [*cpu.SCRIPT_SEAMS, *cpu.SEAMS, *backends.MEGATRON]
    assert all(seam.why for seam in rows)
    assert len({seam.path for seam in rows}) == len(rows)
    assert all(row.why for row in options.DEFAULTS)
    assert all(row.advice.endswith(".") and "need" in row.advice for row in options.REFUSED)


PROBE = """
import gc, sys, torch, torch.cuda, torch.distributed
modules = {name: module for name, module in sys.modules.items() if name.startswith("torch")}
before = {(name, key): id(value) for name, module in modules.items() for key, value in vars(module).items()}
import flashcomm_megatron, flashcomm_megatron.cpu
now = {(name, key): id(value) for name, module in modules.items() for key, value in vars(module).items()}
changed = [key for key in before if before[key] != now[key]]
assert not changed, changed
assert not torch.overrides._get_current_function_mode_stack()
assert not any("megatron.core" in name for name in sys.modules)
"""


def test_importing_touches_nothing_of_torch() -> None:
    ran = forks.python("-c", PROBE)
    assert ran.returncode == 0, ran.stderr


# ---- torch.cuda ---------------------------------------------------------------------------------------------------

ANSWERS: dict[str, tuple[Callable[[], Any], Any]] = {
    "is_available": (lambda: torch.cuda.is_available(), True),
    "is_initialized": (lambda: torch.cuda.is_initialized(), True),
    "current_device": (lambda: torch.cuda.current_device(), torch.device("cpu")),
    "set_device": (lambda: torch.cuda.set_device(3), None),
    "get_device_name": (lambda: torch.cuda.get_device_name(0), "cpu"),
    "get_device_capability": (lambda: torch.cuda.get_device_capability(), (0, 0)),
    "get_device_properties": (lambda: torch.cuda.get_device_properties(0).total_memory, 0),
    "synchronize": (lambda: torch.cuda.synchronize(), None),
    "set_stream": (lambda: torch.cuda.set_stream(torch.cuda.Stream()), None),
    "Stream": (lambda: torch.cuda.Stream(priority=-1).wait_stream(torch.cuda.current_stream()), None),
    "ExternalStream": (lambda: torch.cuda.ExternalStream(0).query(), True),
    "current_stream": (lambda: isinstance(torch.cuda.current_stream(), torch.cuda.Stream), True),
    "default_stream": (lambda: torch.cuda.default_stream().record_event().query(), True),
    "memory_stats": (lambda: torch.cuda.memory_stats()["allocated_bytes.all.peak"], 0),
    "memory_allocated": (lambda: torch.cuda.memory_allocated(), 0),
    "memory_reserved": (lambda: torch.cuda.memory_reserved(), 0),
    "max_memory_allocated": (lambda: torch.cuda.max_memory_allocated(), 0),
    "max_memory_reserved": (lambda: torch.cuda.max_memory_reserved(), 0),
    "mem_get_info": (lambda: torch.cuda.mem_get_info(), (0, 0)),
    "empty_cache": (lambda: torch.cuda.empty_cache(), None),
    "ipc_collect": (lambda: torch.cuda.ipc_collect(), None),
    "reset_peak_memory_stats": (lambda: torch.cuda.reset_peak_memory_stats(), None),
    "range_push": (lambda: torch.cuda.nvtx.range_push("forward"), None),
    "range_pop": (lambda: torch.cuda.nvtx.range_pop(), None),
    "mark": (lambda: torch.cuda.nvtx.mark("here"), None),
    "LongTensor": (lambda: torch.cuda.LongTensor([1, 2]).tolist(), [1, 2]),
    "FloatTensor": (lambda: isinstance(torch.zeros(1), torch.cuda.FloatTensor), True),
    "HalfTensor": (lambda: isinstance(torch.zeros(1), torch.cuda.HalfTensor), False),
}
# These need more than one call to show.
ELSEWHERE = {"device_count", "device", "stream", "range", "Event", "CUDAGraph", "manual_seed", "manual_seed_all",
             "get_rng_state", "set_rng_state", "initial_seed"}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_torch_cuda_answers_as_with_one_gpu(on: None, name: str) -> None:
    call, expected = ANSWERS[name]
    assert call() == expected


def test_every_row_of_torch_cuda_is_tested() -> None:
    rows = {seam.name for seam in (*cpu.SCRIPT_SEAMS, *cpu.SEAMS) if seam.module.startswith("torch.cuda")}
    assert {row for row in rows if not row.endswith("Tensor")} <= set(ANSWERS) | ELSEWHERE


def test_devices_are_the_ranks_of_this_machine(on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert torch.cuda.device_count() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert torch.cuda.device_count() == 4


def test_cuda_contexts_do_nothing(on: None) -> None:
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream()), torch.cuda.nvtx.range("forward"):
        assert torch.ones(2, device="cuda").sum() == 2


def test_cuda_events_read_the_clock(on: None) -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    time.sleep(0.01)
    end.record(torch.cuda.current_stream())
    end.synchronize()
    assert start.elapsed_time(end) >= 10


def test_cuda_random_states_are_the_cpus(on: None) -> None:
    outer = torch.get_rng_state()
    try:
        torch.cuda.manual_seed_all(5)
        state, first = torch.cuda.get_rng_state(), torch.rand(3)
        assert torch.cuda.initial_seed() == 5
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(3), first)
    finally:
        torch.set_rng_state(outer)


def test_a_cuda_graph_is_refused_in_one_sentence(on: None) -> None:
    with pytest.raises(cpu.NeedsGPU, match="CUDA graphs need a GPU: leave"):
        torch.cuda.CUDAGraph()


# ---- the word "cuda" ----------------------------------------------------------------------------------------------


def test_cuda_devices_in_calls_mean_the_cpu(on: None) -> None:
    x = torch.arange(3, device="cuda:1")
    device = torch.device("cuda", 0)
    made = [
        x,
        x.to("cuda"),
        x.to(device),
        x.to(device=device),
        torch.empty(2, pin_memory=True, device="cuda"),
        x.cuda(0),
    ]
    made += [x.new_zeros(2, device="cuda"), torch.empty_like(x, device=f"cuda:{torch.cuda.current_device()}")]
    made += [
        x.pin_memory(),
        x.cuda(non_blocking=True),
        torch.nn.Linear(2, 2).cuda().weight,
        torch.rand(2, device=device),
    ]
    assert all(tensor.device.type == "cpu" for tensor in made)
    assert x.cuda() is x
    x.record_stream(torch.cuda.current_stream())


def test_tensor_types_can_be_named_as_cudas(on: None) -> None:
    x = torch.zeros(2)
    assert x.type() == "torch.cuda.FloatTensor" and x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type("torch.cuda.HalfTensor").dtype == torch.float16
    assert x.type(torch.int64).dtype == torch.int64


def test_words_that_are_no_device_stay(on: None) -> None:
    assert torch.device("mps").type == "mps"
    with pytest.raises(RuntimeError):
        torch.zeros(1, device="cudart")


def test_threads_started_later_are_in_cpu_mode_too(on: None) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(torch.zeros(1, device="cuda").device.type))
    thread.start()
    thread.join()
    assert found == ["cpu"]


def test_leaving_keeps_other_modes() -> None:
    class Other(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    literals.enter()
    with Other() as other:
        literals.leave()
        assert torch.overrides._get_current_function_mode_stack() == [other]
    assert not torch.overrides._get_current_function_mode_stack()


# ---- the command -------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
print(sys.argv, __name__, sys.path[0])
print(torch.zeros(2, device="cuda").cuda().device, torch.cuda.is_available())
if "graph" in sys.argv:
    torch.cuda.CUDAGraph()
"""


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return forks.python("-m", "flashcomm_megatron", *words, folder=folder)


def test_the_command_consumes_cpu_and_names_what_needs_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = command("--cpu", "script.py", "--lr", "1", "graph", folder=tmp_path)
    first, second = ran.stdout.splitlines()
    assert first == f"['script.py', '--lr', '1', 'graph'] __main__ {tmp_path}" and second == "cpu True"
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert ran.stderr.endswith("flashcomm_megatron: error: CUDA graphs need a GPU: "
                               "leave --cuda-graph-impl and --enable-cuda-graph out.\n")  # fmt: skip


def test_a_module_runs_as_with_python_m(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "script.py").write_text("import sys\nfrom . import near\nprint(near.x, sys.argv[1:])")
    (tmp_path / "package" / "near.py").write_text("x = 7")
    ran = command("-m", "package.script", "--lr", "1", folder=tmp_path)
    assert ran.stdout == "7 ['--lr', '1']\n", ran.stderr


def test_cpu_alone_is_one_sentence(tmp_path: Path) -> None:
    for words, told in {("--cpu",): "--cpu: nothing after it: give a script's path",
                        ("-m",): "-m: nothing after it", ("--cpu", "-m"): "-m: nothing after it",
                        ("--cpu", "report"): "report: no such file"}.items():  # fmt: skip
        ran = command(*words, folder=tmp_path)
        assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and told in ran.stderr


NOTEBOOK = """
from megatron.core.tensor_parallel import layers
before = layers.RowParallelLinear.forward
import flashcomm_megatron as fc
assert layers.RowParallelLinear.forward is before
fc.enable(bits=4)
assert layers.RowParallelLinear.forward is not before
fc.disable()
assert layers.RowParallelLinear.forward is before
"""


def test_a_notebook_may_import_megatron_first() -> None:
    ran = forks.python("-c", NOTEBOOK)
    assert ran.returncode == 0, ran.stderr
