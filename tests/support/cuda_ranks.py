"""Several ranks on one GPU inside one process: in one launch, or each on its own stream.

One launch: all ranks are blocks of one grid, so a call is all or nothing and can be timed and captured. Streams: each
rank launches its own kernels, which overtake each other as those of separate GPUs do. Both run the kernel of
csrc/cuda/collectives.h over inboxes made here; host_memory=True puts these into pinned host memory, behind the PCIe
link.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from specification import cut
from torch import Tensor

from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.comm import shared_memory
from flashcomm_megatron.comm.fused import KINDS

# Where stand_ins/cuda runs the kernels, tests make fewer calls and wait longer.
SLOWER = 100 if "FLASHCOMM_CUDA_STAND_IN" in os.environ else 1

Codecs = tuple[Any, Any]  # of the reduce and the gather leg, each with ``native``


class Inboxes:
    """``world`` inboxes on the current device or in pinned host memory."""

    def __init__(self, world: int, blocks: int, region: int, host_memory: bool = False) -> None:
        self.cuda: Any = extension.cuda()
        self.world, self.blocks = world, blocks
        self.region = max(region, blocks * self.cuda.slot_bytes())
        self._size = self.cuda.inbox_bytes(world, self.region)
        self._segments: list[shared_memory.Segment] = []
        self.addresses = [
            self._pinned() if host_memory else self.cuda.device_allocate(0, self._size) for _ in range(world)
        ]

    def _pinned(self) -> int:
        made = shared_memory.create(self._size)
        shared_memory.remove(made.name)
        self._segments.append(made)
        return int(self.cuda.host_register(0, made.address, self._size))

    def free(self) -> None:
        """Give the memory back; nothing may be running."""
        for made in self._segments:
            self.cuda.host_unregister(made.address)
            made.close()
        for address in [] if self._segments else self.addresses:
            self.cuda.device_free(0, address)
        self.addresses, self._segments = [], []


def resident_blocks(world: int) -> int:
    """Thread blocks each of ``world`` ranks on the current device may launch."""
    cuda: Any = extension.cuda()
    return max(1, int(cuda.device_blocks(0)) // world)


class OneLaunch:
    """``world`` ranks that run in one launch."""

    def __init__(self, world: int, blocks: int = 0, region: int = 1 << 20, host_memory: bool = False) -> None:
        blocks = blocks or resident_blocks(world)
        self.inboxes = Inboxes(world, blocks, region, host_memory)
        self.world = world
        self.kernels = self.inboxes.cuda.Workspace(
            0, world, 0, world, blocks, self.inboxes.region, self.inboxes.addresses
        )

    def run(
        self,
        kind: str,
        codecs: Codecs,
        x: Sequence[Tensor],
        out: Sequence[Tensor],
        residuals: Sequence[Tensor] = (),
        **tests: Any,
    ) -> None:
        """One collective over all ranks, on the current stream; ``residuals``: the ranks' own, of the legs in turn."""
        self.kernels.launch(request(self.inboxes.cuda, self.world, kind, codecs, x, out, residuals, **tests))

    def shape(self, kind: str, codecs: Codecs, x: Sequence[Tensor], out: Sequence[Tensor]) -> list[int]:
        """[rounds, tile, blocks, depth, stride]"""
        return list(self.kernels.shape(request(self.inboxes.cuda, self.world, kind, codecs, x, out)))

    def close(self) -> None:
        """Give everything back."""
        self.kernels.close()
        self.inboxes.free()


class Streams:
    """``world`` ranks that launch their own kernels, each on its own stream."""

    def __init__(self, world: int, blocks: int = 0, region: int = 1 << 20) -> None:
        blocks = blocks or resident_blocks(world)
        self.inboxes = Inboxes(world, blocks, region)
        make = self.inboxes.cuda.Workspace
        arguments = blocks, self.inboxes.region, self.inboxes.addresses
        self.kernels = [make(0, world, rank, 1, *arguments) for rank in range(world)]
        self.streams = [torch.cuda.Stream() for _ in range(world)]
        self.world = world

    def run(self, rank: int, kind: str, codecs: Codecs, x: Tensor, out: Tensor, **tests: Any) -> None:
        """One rank's part of a collective."""
        with torch.cuda.stream(self.streams[rank]):
            self.kernels[rank].launch(request(self.inboxes.cuda, self.world, kind, codecs, [x], [out], **tests))

    def run_all(self, kind: str, codecs: Codecs, x: Sequence[Tensor], out: Sequence[Tensor], **tests: Any) -> None:
        """Every rank's part."""
        for rank in range(self.world):
            self.run(rank, kind, codecs, x[rank], out[rank], **tests)

    def close(self) -> None:
        """Give everything back."""
        for kernels in self.kernels:
            kernels.close()
        self.inboxes.free()


def request(
    cuda: Any,
    world: int,
    kind: str,
    codecs: Codecs,
    x: Sequence[Tensor],
    out: Sequence[Tensor],
    residuals: Sequence[Tensor] = (),
    **tests: Any,
) -> Any:
    """What the extension is asked to launch on the current stream."""
    numel = max(x[0].numel(), out[0].numel())
    fitted, length = cut(kind, codecs, numel, world)
    reduce, gather = (cuda.Leg(*codec.native) for codec in fitted)
    return cuda.Request(
        kind=KINDS[kind],
        reduce=reduce,
        gather=gather,
        dtype=extension.DTYPES[x[0].dtype],
        numel=numel,
        slice=length,
        x=[each.data_ptr() for each in x],
        out=[each.data_ptr() for each in out],
        residuals=[each.data_ptr() for each in residuals],
        stream=torch.cuda.current_stream().cuda_stream,
        **{"deadline": 20.0, **tests},
    )
