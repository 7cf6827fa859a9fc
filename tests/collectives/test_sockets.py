"""GPUs on two sockets that PCIe joins: reduce inside a socket, exchange across, gather inside; by what ranks report."""

from __future__ import annotations

import ctypes
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from specification import LAUNCHES
from torch import Tensor

from flashcomm_megatron.codec.base import Slices
from flashcomm_megatron.collectives import ALGORITHMS, algorithms, plan
from flashcomm_megatron.collectives.minimum_size import DEFAULTS
from flashcomm_megatron.comm import simulated, sockets
from flashcomm_megatron.comm.communicator import Communicator, Gpus
from flashcomm_megatron.comm.simulated import Simulated
from flashcomm_megatron.config import Config
from flashcomm_megatron.tools.plan import cost
from flashcomm_megatron.tools.plan.hardware import GPUS, LINKS, Gpu

CONFIG, META = Config(bits=4, min_bytes=0), torch.device("meta")
LAYOUTS = [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1, 1, 1), (0, 0, 0, 0, 1, 1, 1, 1)]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SOCKETS_BYTES", 1)


def part(rank: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).bfloat16()


def planned(comm: Simulated, x: Tensor, places: tuple[int, ...], config: Config = CONFIG) -> plan.Plan:
    comm._kind, comm.gpus = "cuda", Gpus(places)
    return plan.plan("all_reduce", x.shape, x.dtype, x.device, comm, config)


def sums(parts: list[Tensor], places: tuple[int, ...], residuals: list[Any] | None = None) -> list[Tensor]:
    def start(comm: Simulated) -> Any:
        x = parts[comm.rank].clone()
        made = planned(comm, x, places)
        return ALGORITHMS[made.algorithm](x, x, made, made.call(), residuals and residuals[comm.rank])

    return simulated.run(start, len(parts))


def defined(parts: list[Tensor], places: tuple[int, ...], slices: Slices) -> Tensor:
    """The same from single tensors: each slice through three roundings."""
    reduce, gather, between = CONFIG.legs.reduce, CONFIG.legs.gather, CONFIG.legs_of(6).reduce
    out, width = torch.empty_like(parts[0]).view(-1), slices.width
    for number, into in enumerate(slices.of(out)):
        crossing = []
        for socket in (0, 1):
            near = [slices.of(x.view(-1))[number] for x, each in zip(parts, places, strict=True) if each == socket]
            total = reduce.decode_sum([reduce.encode(x, width=width) for x in near], into.clone(), width)
            crossing.append(between.encode(total, width=width))
        between.decode_sum(crossing, into, width)
        gather.decode_sum([gather.encode(into.clone(), width=width)], into, width)
    return out.view(parts[0].shape)


@pytest.mark.parametrize("shape", [(37, 576), (8, 64), (16000,)])
@pytest.mark.parametrize("places", LAYOUTS)
def test_the_sum_is_that_of_the_sockets_sums_and_ranks_agree(places: tuple[int, ...], shape: tuple[int, ...]) -> None:
    parts = [part(rank, shape) for rank in range(len(places))]
    made = planned(Simulated(0, len(places)), parts[0], places)
    assert made.algorithm == "sockets" and made.within is not None
    found, expected = sums(parts, places), defined(parts, places, made.within.pieces[0].slices)
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("world", [4, 8])
def test_a_third_rounding_loses_next_to_nothing(world: int) -> None:
    parts, places = [part(rank, (64, 1024)) for rank in range(world)], tuple(2 * each // world for each in range(world))
    exact = sum(x.float() for x in parts)
    thrice, twice = ((sums(parts, each)[0].float() - exact).norm() for each in (places, (0,) * world))
    assert thrice < 1.1 * twice


def test_residuals_of_all_three_roundings_are_repaid() -> None:
    places, shape = (0, 0, 1, 1), (32, 256)
    parts, residuals = [part(rank, shape) for rank in range(4)], [algorithms.Residuals() for _ in range(4)]
    exact, total = sum(x.float() for x in parts), torch.zeros(shape)
    for _ in range(8):
        found = sums(parts, places, residuals)
        assert all(torch.equal(each, found[0]) for each in found)
        total += found[0].float()
    once = (sums(parts, places)[0].float() - exact).norm()
    assert (total / 8 - exact).norm() < once / 3
    assert set(residuals[0].kept) == {(0, "reduce"), (0, "across"), (0, "gather")}


def test_a_rank_without_a_slice_means_two_steps() -> None:
    x = part(0, (1, 32))
    assert planned(Simulated(0, 8), x, LAYOUTS[-1]).algorithm == "two-step"


def test_chosen_by_auto_alone_over_the_process_group_from_its_size_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def chosen(nbytes: int = 4 << 20, places: tuple[int, ...] = LAYOUTS[-1], **options: Any) -> str:
        x = torch.empty(nbytes // 8192, 4096, dtype=torch.bfloat16, device="meta")
        return planned(Simulated(0, len(places)), x, places, Config(bits=4, **options)).algorithm

    assert chosen() == "sockets"
    for options in ({"nbytes": 2 << 20}, {"transport": "peer"}, {"algorithm": "two-step"}, {"recipe": "flash-v1"}):
        assert chosen(**options) == "two-step"
    for places in ((0,) * 8, (0, 0, 0, 1), (0, 1, 1, 0), (0, 0, 1, 1, 2, 2)):
        assert chosen(places=places) == "two-step"
    assert chosen(places=(0, 1)) == "one-step"


def test_in_batch_invariant_mode_the_number_of_rows_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SOCKETS_BYTES", 4 << 20)
    comm = Simulated(0, 4, kind="cuda")
    comm.gpus = Gpus((0, 0, 1, 1))

    def algorithms_of(by_row: bool) -> set[str]:
        shapes = [(rows, 4096) for rows in (4, 256, 512, 4096)]
        made = (plan.plan("all_reduce", each, torch.bfloat16, META, comm, CONFIG, by_row=by_row) for each in shapes)
        return {each.algorithm for each in made}

    assert algorithms_of(by_row=True) == {"two-step"} and algorithms_of(by_row=False) == {"two-step", "sockets"}


def test_a_tensor_crosses_between_the_sockets_once() -> None:
    """In compressed bytes; counted bytes are those sent."""
    places, sent = LAYOUTS[-1], Counter[tuple[bool, int]]()

    class Counting(Simulated):
        def exchange(self, outbox, out_sizes, inbox, in_sizes, call):  # type: ignore[no-untyped-def]
            for to, size in enumerate(out_sizes):
                sent[places[to] != places[self.rank], self.rank] += size * (to != self.rank)
            return super().exchange(outbox, out_sizes, inbox, in_sizes, call)

    plans: dict[int, plan.Plan] = {}

    def start(comm: Simulated) -> Any:
        counting, x = Counting(comm.rank, comm.world, mailbox=comm._mailbox), part(comm.rank, (64, 256))
        plans[comm.rank] = made = planned(counting, x, places)
        return ALGORITHMS[made.algorithm](x, x, made, made.call())

    simulated.run(start, 8)
    assert {rank: sent[True, rank] + sent[False, rank] for rank in plans} == {r: p.wire_bytes for r, p in plans.items()}
    one_way = sum(sent[True, rank] for rank in range(4))
    assert one_way == 4 * CONFIG.legs_of(6).reduce.wire_bytes(16 * 256, 256)


@pytest.mark.parametrize(("inside", "between"), [(24e9, "pcie4-sockets"), (48e9, "pcie5-sockets")])
def test_by_the_planners_rates_it_pays_from_its_size_on(inside: float, between: str) -> None:
    """Two steps: an all-to-all crosses twice over, a ring's gather 7/8 times. One exchange more costs its latency."""
    link, (reduce, gather) = LINKS[between], cost.value_bytes(Config(bits=4))
    crossing, _ = cost.value_bytes(Config(bits=6))
    for mib in (4, 16, 64, 256):
        values = mib * (1 << 20) / 2
        flat = values * (2 * reduce + 7 / 8 * gather) / link.rate
        staged = values * (0.75 * (reduce + gather) / inside + crossing / link.rate) + link.latency
        assert staged < flat, mib


# ---- where a GPU is -----------------------------------------------------------------------------------------------


def test_the_package_beside_a_device_is_found_and_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "SYSTEM", tmp_path)
    for name, text in {
        "bus/pci/devices/0000:c1:00.0/numa_node": "5\n",
        "devices/system/node/node5/cpulist": "40-47,104-111\n",
        "devices/system/cpu/cpu40/topology/physical_package_id": "1\n",
        "bus/pci/devices/0000:01:00.0/numa_node": "-1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [sockets.package(f"0000:{bus}:00.0") for bus in ("c1", "01", "02")] == ["1", "", ""]


@pytest.mark.parametrize(("up", "expected"), [((), False), ((3,), True), (None, None)])
def test_nvlink_is_asked_of_the_driver(up: Any, expected: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(handle: Any, number: int, is_up: Any) -> int:
        is_up._obj.value = number in up
        return 0 if number < 4 else 2  # a link that there is not

    nvml = SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByPciBusId_v2=lambda bus, handle: 0 if up is not None else 2,
        nvmlDeviceGetNvLinkState=state,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    assert sockets.has_nvlink("0000:c1:00.0") is expected


def test_without_a_gpu_nothing_is_said() -> None:
    assert sockets.socket() == ""


def reported(rank: int, world: int, places: list[str]) -> tuple[bool, tuple[int, ...]]:
    sockets.socket = lambda: places[rank]
    found = Communicator.of(dist.group.WORLD).gpus
    return found.has_nvlink, found.sockets


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["1", "1", "0", "0"], (False, (0, 0, 1, 1))),
        (["0", "", "1", "1"], (False, (0,) * 4)),
        ([sockets.NVLINK] * 4, (True, (0,) * 4)),
        ([sockets.NVLINK, sockets.NVLINK, "0", "0"], (True, (0,) * 4)),
    ],
)
def test_all_ranks_decide_by_what_all_report(places: list[str], expected: Any) -> None:
    assert spawn(reported, 4, places) == [expected] * 4


# ---- from which size on -------------------------------------------------------------------------------------------


def deferred(nbytes: int, has_nvlink: bool, transport: str = "auto") -> str | None:
    comm, config = Simulated(0, 8, kind="cuda"), Config(bits=4, transport=transport)
    comm.gpus = comm.gpus._replace(has_nvlink=has_nvlink)
    return plan.plan("all_reduce", (nbytes // 8192, 4096), torch.bfloat16, META, comm, config).deferred


def test_over_nvlink_only_what_is_large_is_compressed_unless_one_kernel_does_it() -> None:
    mib = 1 << 20
    assert deferred(mib, False) is None and deferred(mib // 2, False) == f"below {mib} bytes"
    assert deferred(255 * mib, True) == f"below {256 * mib} bytes" and deferred(256 * mib, True) is None
    assert deferred(mib, True, transport="peer") is None


def gains(gpu: Gpu, nbytes: int, world: int) -> float:
    """Seconds, by the planner's cost and what launches take over NCCL."""
    codec, link = cost.on_gpu(Config(bits=4, min_bytes=0), gpu), LINKS[gpu.link]
    collective, pieces = cost.Collective("all_reduce", nbytes // 2, world), plan.gpu_pieces(nbytes)
    wire, coding = cost.sent_bytes(collective, codec) / link.send_rate(world), cost.codec_seconds(collective, codec)
    ours = link.latency + pieces * LAUNCHES + max(wire, coding) + min(wire, coding) / pieces
    return cost.seconds(link, collective, None) - ours


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("name", GPUS)
def test_minimum_sizes_of_gpus_are_the_planners(name: str, world: int) -> None:
    """On PCIe compression pays from the minimum size on; over NVLink nowhere from a sixteenth of it down."""
    gpu = GPUS[name]
    if gpu.link.startswith("pcie"):
        assert all(gains(gpu, DEFAULTS["cuda"] << more, world) > 0 for more in range(8))
    elif gpu.link.startswith("nvlink"):
        assert all(gains(gpu, DEFAULTS["nvlink"] >> more, world) < 0 for more in range(4, 10))
