"""The fused collectives run on the host, ranks in any order: emulator.cpp, built once, called through ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from specification import cut
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["tests/support/emulator.cpp", "tests/support/stand_ins/cuda/fibers.cpp"]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KINDS = {"one-step": 0, "two-step": 1, "reduce_scatter": 2, "all_gather": 3}
MAX_WORLD = 8


class Setting(ctypes.Structure):
    """A codec as the kernels know it: csrc/cuda/tile.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("format", "bits", "block")]


class Job(ctypes.Structure):
    """One collective on all ranks: emulator.cpp's Job."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("reduce", Setting),
        ("gather", Setting),
        ("dtype", ctypes.c_int),
        ("numel", ctypes.c_int64),
        ("slice", ctypes.c_int64),
        ("x", ctypes.c_void_p * MAX_WORLD),
        ("out", ctypes.c_void_p * MAX_WORLD),
        ("lost", ctypes.c_void_p * (2 * MAX_WORLD)),
        ("stalled_rank", ctypes.c_int),
        ("single_buffer", ctypes.c_int),
        ("stall", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
    ]


@lru_cache
def library() -> Any:
    """The emulator, compiled into a folder that goes with this process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "emulator.so"
    compiler = shutil.which(os.environ.get("CXX", "g++").split()[0]) or "c++"
    flags = [
        "-Icsrc",
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-fno-omit-frame-pointer",
        "-fno-thread-jumps",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    subprocess.run([compiler, *flags, *SOURCES, "-o", str(path)], cwd=ROOT, check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.folder = folder
    for name in ("world_new",):
        getattr(loaded, name).restype = ctypes.c_void_p
    for name in ("error", "epoch", "polls", "polls_again", "read_early", "announced_early"):
        getattr(loaded, f"world_{name}").restype = ctypes.c_uint64
    for name in ("shape", "rule_reached"):
        getattr(loaded, name).restype = ctypes.c_bool
    return loaded


class Shape(ctypes.Structure):
    """How the kernel cuts a call: csrc/cuda/shape.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("numel", "slice", "rounds")),
        *((name, ctypes.c_int) for name in ("tile", "blocks", "depth", "stride")),
    ]


class World:
    """``world`` ranks with their inboxes; at most ``blocks`` thread blocks a rank, ``region`` bytes an inbox region."""

    def __init__(self, world: int, blocks: int = 2, region: int = 2 * 16384, epoch: int = 0) -> None:
        self.world = world
        self._as_parameter_ = ctypes.c_void_p(
            library().world_new(world, blocks, ctypes.c_int64(region), ctypes.c_uint64(epoch))
        )

    def __del__(self) -> None:
        library().world_free(self)

    def job(
        self,
        kind: str,
        codecs: Any,
        x: Sequence[Tensor],
        out: Sequence[Tensor],
        lost: Sequence[Sequence[Tensor]] = (),
        **tests: int,
    ) -> Job:
        """``codecs``: (reduce, gather), each with ``native``; ``lost``: residuals by leg and rank, or none."""
        numel = (out if kind == "all_gather" else x)[0].numel()
        fitted, length = cut(kind, codecs, numel, self.world)
        reduce, gather = (Setting(*codec.native) for codec in fitted)
        job = Job(KINDS[kind], reduce, gather, DTYPES[x[0].dtype], numel, length)
        job.deadline = 10**12
        for rank in range(self.world):
            job.x[rank], job.out[rank] = x[rank].data_ptr(), out[rank].data_ptr()
        for leg, residuals in enumerate(lost):
            for rank, residual in enumerate(residuals):
                job.lost[leg * MAX_WORLD + rank] = residual.data_ptr()
        for name, value in tests.items():
            setattr(job, name, value)
        return job

    def shape(self, job: Job) -> Shape:
        """How the kernel cuts ``job``."""
        found = Shape()
        assert library().shape(self, ctypes.byref(job), ctypes.byref(found)), "no kernel for these legs"
        return found

    def run(self, jobs: Sequence[Job], seed: int = 0, absent: int = 0, late: int = 0) -> None:
        """Every rank runs all jobs in order. Ranks in the bit mask ``absent`` never start, those in ``late`` when all
        others do nothing but wait."""
        assert library().run(self, (Job * len(jobs))(*jobs), len(jobs), seed, absent, late) == 0

    def error(self, rank: int) -> int:
        """The packed word of the flag that rank missed, or 0."""
        return library().world_error(self, rank)

    def polls(self, rank: int, again: bool = False) -> int:
        """How often rank read a flag in the last run; ``again``: one that it had seen to be there."""
        return library().world_polls_again(self, rank) if again else library().world_polls(self, rank)

    def read_early(self, rank: int) -> set[int]:
        """The ranks whose payloads ``rank`` had read when the late ones began."""
        mask = library().world_read_early(self, rank)
        return {source for source in range(self.world) if mask >> source & 1}

    def announced_early(self, rank: int) -> int:
        """The last exchange that ``rank`` had announced when the late ones began; without late ones at the end."""
        return library().world_announced_early(self, rank)

    def epoch(self, rank: int) -> int:
        """Exchanges this rank has ended."""
        return library().world_epoch(self, rank)
