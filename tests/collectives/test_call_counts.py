"""How many of our functions one call runs, a cost that no busy machine hides; and how many native codec calls."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch.utils._python_dispatch import TorchDispatchMode

import flashcomm_megatron
from flashcomm_megatron import collectives
from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.comm import fused
from flashcomm_megatron.comm.communicator import Communicator
from flashcomm_megatron.comm.process_group import ProcessGroup
from flashcomm_megatron.config import Config
from flashcomm_megatron.megatron import context, layers

pytestmark = pytest.mark.skipif(extension.module() is None, reason="the extension is not built")

PACKAGE = str(Path(flashcomm_megatron.__file__).parent)
AIMS = {"compressed": 80, "deferred": 15, "fused": 40}
NATIVE_CALLS = {
    "all_reduce": {2: 2, 4: 3, 8: 3},
    "reduce_scatter": {2: 2, 4: 2, 8: 2},
    "all_gather": {2: 2, 4: 2, 8: 2},
}


def counted(run: Callable[[], Any]) -> Counter[str]:
    """Functions of the package that ``run`` calls on this thread, with how often."""
    found: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def counts(rank: int, world: int, transport: str) -> dict[str, Counter[str]]:
    """What an all-reduce calls once it was called before; and a deferred one."""
    x, config = torch.randn(64, 256).bfloat16(), Config(bits=4, min_bytes=1024, transport=transport)
    small = torch.ones(4)

    def compressed() -> None:
        collectives.all_reduce(x, None, config)

    def deferred() -> None:
        collectives.all_reduce(small, None, config)

    found = {}
    for name, run in (("compressed", compressed), ("deferred", deferred)):
        for _ in range(3):
            run()
        found[name] = counted(run)
        dist.barrier()
    return found


@pytest.mark.parametrize("transport", ["group", "shared-memory"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_calls_of_our_functions_stay_few(world: int, transport: str) -> None:
    for rank in spawn(counts, world, transport):
        for name in rank:
            assert sum(rank[name].values()) <= AIMS[name], f"{name}: {rank[name]}"


def native_calls(rank: int, world: int) -> dict[str, int]:
    """Calls of the compiled codec in one collective of each kind."""
    config, native = Config(bits=4, min_bytes=0), extension.module()
    calls: list[str] = []

    class Counting:
        """The extension, whose codec calls are noted."""

        def __getattr__(self, name: str) -> Any:
            found = getattr(native, name)
            if name.startswith(("encode", "decode", "reduce")):
                calls.append(name)
            return found

    found = {}
    for kind in NATIVE_CALLS:
        x, call = torch.randn(8 * world, 256).bfloat16(), getattr(collectives, kind)
        call(x, None, config)
        extension._extension = Counting()
        calls.clear()
        call(x, None, config)
        found[kind] = len(calls)
        extension._extension = native
    return found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_native_calls_do_not_grow_with_the_ranks(world: int) -> None:
    expected = {kind: by_world[world] for kind, by_world in NATIVE_CALLS.items()}
    assert spawn(native_calls, world) == [expected] * world


def launched(rank: int, world: int, ranks: int) -> dict[str, int]:
    """Native codec calls, each a launch on a GPU, and collectives of the backend that one all-reduce makes there."""
    dist.destroy_process_group()
    sys.path.insert(0, str(Path(PACKAGE).parent / "benchmarks"))
    import bench_host

    codec, found = bench_host.idle_codec(), Counter[str]()
    for name in ("encode_slices", "reduce_slices", "decode_slices"):
        setattr(codec, name, lambda *_, name=name: found.update(["launches"]))
    call = bench_host.on_fake_ranks(ranks, codec)
    for name in ("exchange", "gather"):
        of_group = getattr(ProcessGroup, name)
        asked = f"asked for {name}"
        counting = lambda *a, of_group=of_group, asked=asked: found.update([asked]) or of_group(*a)  # noqa: E731
        setattr(ProcessGroup, name, counting)
    call()
    found.clear()
    call()
    return dict(found)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_an_all_reduce_over_nccl_is_three_launches_and_two_collectives_at_most(world: int) -> None:
    (found,) = spawn(launched, 1, world)
    one_step = {"launches": 2, "asked for gather": 1}
    assert found == (one_step if world == 2 else {"launches": 3, "asked for exchange": 1, "asked for gather": 1})


class Made(TorchDispatchMode):
    """Notes what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def made_tensors(rank: int, world: int, ranks: int) -> list[str]:
    """What torch makes in a call that was made before: tensors and views cost more than encoding what is small."""
    dist.destroy_process_group()
    sys.path.insert(0, str(Path(PACKAGE).parent / "benchmarks"))
    import bench_host

    call = bench_host.on_fake_ranks(ranks, bench_host.idle_codec())
    arrived = SimpleNamespace(wait=lambda: None)
    backend = SimpleNamespace(alltoall_base=lambda *_: arrived, _allgather_base=lambda *_: arrived)
    Communicator.of(dist.group.WORLD)._over_group._backends["cpu"] = backend
    call()
    with torch.no_grad(), Made() as noting:
        call()
    return noting.names


@pytest.mark.parametrize("world", [2, 8])
def test_no_tensor_is_made_in_a_call_that_was_made_before(world: int) -> None:
    assert spawn(made_tensors, 1, world) == [[]]


class OnGPU(torch.Tensor):
    """A tensor in main memory that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


def fused_calls(rank: int, world: int, ranks: int) -> Counter[str]:
    """What an all-reduce by one kernel calls up to the launch and back; the kernel does nothing."""
    dist.destroy_process_group()
    sys.path.insert(0, str(Path(PACKAGE).parent / "benchmarks"))
    import bench_host

    launches: list[Any] = []
    kernels = SimpleNamespace(error=lambda: None, launch=launches.append)
    cuda = SimpleNamespace(
        Leg=lambda *native: native, Request=SimpleNamespace, Workspace=lambda *_: kernels,
        has_collective=lambda *_: True, has_codec_cuda=lambda *_: True,
    )  # fmt: skip
    bench_host.on_fake_ranks(ranks, bench_host.idle_codec())
    x, config = (
        torch.ones(64, 4096, dtype=torch.bfloat16).as_subclass(OnGPU),
        Config(bits=4, min_bytes=0, transport="peer"),
    )
    extension._extension = SimpleNamespace(cuda=cuda, has_codec_cuda=lambda *_: True, info=dict)
    extension.cuda = fused.native.cuda = lambda: cuda
    torch.cuda.is_current_stream_capturing = lambda: True  # so that no error is sampled
    torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0)
    inboxes = SimpleNamespace(addresses=[])
    fused._made[dist.group.WORLD] = {"peer": fused.Workspace(cuda, inboxes, dist.group.WORLD, 0, 1, 1)}
    seam = layers.all_reduce(lambda *_: None)
    with context.at(context.Site("row", torch.nn.Linear(1, 1), config)):
        for _ in range(3):
            found = counted(lambda: seam(x, dist.group.WORLD))
    assert len(launches) == 3
    return found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_calls_of_our_functions_up_to_a_fused_launch_stay_few(world: int) -> None:
    (found,) = spawn(fused_calls, 1, world)
    assert sum(found.values()) <= AIMS["fused"], str(found)
