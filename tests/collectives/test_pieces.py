"""Large tensors on GPUs: as many pieces as pay, the same bits, and nothing waits that need not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specification import LAUNCHES, planned
from torch import Tensor

from flashcomm_megatron.codec.base import Codec
from flashcomm_megatron.collectives import ALGORITHMS, plan
from flashcomm_megatron.comm import simulated
from flashcomm_megatron.comm.simulated import Simulated
from flashcomm_megatron.config import Config
from flashcomm_megatron.tools.plan import cost
from flashcomm_megatron.tools.plan.hardware import GPUS, LINKS

MIB = 1 << 20


def pieces_of(nbytes: int, world: int, **options: Any) -> int:
    x = torch.empty(nbytes // (2 * 8192), 8192, dtype=torch.bfloat16, device="meta")
    return len(planned("all_reduce", x, world, Config(bits=4, **options), over="cuda").pieces)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_pieces_grow_as_the_root_of_the_tensor(world: int) -> None:
    sizes = {1: 1, 80: 1, 319: 1, 320: 2, 719: 2, 720: 3, 1280: 4}
    assert {mib: pieces_of(mib * MIB, world) for mib in sizes} == sizes
    assert {pieces_of(1280 * MIB, world, transport=fused) for fused in ("peer", "host")} == {1}


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_no_machine_of_the_planner_loses_by_pieces(gpu: Any, world: int) -> None:
    """By its cost of codec and link: what pieces hide is more than their launches take."""
    codec, link = cost.on_gpu(Config(bits=4), gpu), LINKS[gpu.link]
    for mib in (128, 256, 512, 1024, 2048):
        collective = cost.Collective("all_reduce", mib * MIB // 2, world)
        wire = cost.sent_bytes(collective, codec) / link.send_rate(world)
        coding, pieces = cost.codec_seconds(collective, codec), plan.gpu_pieces(mib * MIB)
        whole = wire + coding
        assert max(wire, coding) + min(wire, coding) / pieces + (pieces - 1) * LAUNCHES <= whole, mib


def sums(x: list[Tensor], over: str) -> list[Tensor]:
    def start(comm: Simulated) -> Any:
        mine = x[comm.rank].clone()
        comm._kind = over
        made = plan.plan("all_reduce", mine.shape, mine.dtype, mine.device, comm, Config(bits=4, min_bytes=0))
        return ALGORITHMS[made.algorithm](mine, mine, made, made.call(), None)

    return simulated.run(start, len(x))


@pytest.mark.parametrize("world", [2, 3])
def test_rows_have_the_same_bits_in_pieces_each_with_its_own_codec_calls(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = [torch.randn(37, 576, generator=torch.Generator().manual_seed(rank)).bfloat16() for rank in range(world)]
    whole, encoded = sums(x, "cuda"), []
    encode = Codec.encode_slices
    monkeypatch.setattr(Codec, "encode_slices", lambda *a: encoded.append(a[2].numel) or encode(*a))
    monkeypatch.setattr(plan, "GPU_UNIT", x[0].nbytes // 9)
    cut = sums(x, "cuda")
    assert len(encoded) == 3 * world and sum(encoded) == world * x[0].numel()
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_the_second_piece_is_encoded_before_the_first_one_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "GPU_UNIT", 1 << 10)
    order: list[str] = []
    for name in ("encode_slices", "reduce_slices", "decode_slices"):
        monkeypatch.setattr(Codec, name, lambda *a, name=name, **k: order.append(name[:6]))
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    comm = Simulated(0, 3, kind="cuda", mailbox=simulated.Mailbox())
    made = plan.plan("all_reduce", x.shape, x.dtype, x.device, comm, Config(bits=4, min_bytes=0))
    for _ in ALGORITHMS["two-step"](x, x, made, made.call(), None):
        order.append("wait")
    assert len(made.pieces) == 2
    assert order == ["encode", "encode", "wait", "reduce", "wait", "reduce", "wait", "decode", "wait", "decode"]
