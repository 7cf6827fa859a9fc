"""Codecs and collectives by their machine code: compiled once a process, parameters from the host code, tensors in and
out."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from specification import cut
from torch import Tensor

from .disassembly import ROOT, Program, compile_cubin, read
from .machine import Counts, Machine
from .memory import GlobalMemory

SOURCE = Path(__file__).with_name("kernels.cu")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TYPES = {torch.float32: "Float32", torch.float16: "Float16", torch.bfloat16: "BFloat16"}
FORMATS = {0: "uniform{}", 1: "rotated", 2: "spike"}  # of csrc/api.h, in the kernels' names
KINDS = {"one-step": 0, "two-step": 1, "reduce_scatter": 2, "all_gather": 3}
MAX_WORLD = 8
ALL, FIRST = "-DCODECS=2", "-DCODECS=1"  # every codec; flash-v1's 4 bits and auto's


class Setting(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("format", "bits", "block")]


class Launch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("blocks", "shared", "bytes")),
        ("parameters", ctypes.c_uint8 * 2048),
    ]


class Group(ctypes.Structure):
    _fields_ = [
        ("world", ctypes.c_int),
        ("blocks", ctypes.c_int),
        ("region", ctypes.c_int64),
        *((name, ctypes.c_uint64 * MAX_WORLD) for name in ("x", "out", "control", "own", "inbox")),
    ]


FOLDER = tempfile.TemporaryDirectory()


@lru_cache
def host() -> Any:
    """The host's half of kernels.cu: how launches are made."""
    path = Path(FOLDER.name) / "launches.so"
    flags = ["-x", "c++", "-Icsrc", "-std=c++17", "-O1", "-fPIC", "-shared", "-DFLASHCOMM_ISA=sass"]
    subprocess.run([shutil.which("g++") or "c++", *flags, str(SOURCE), "-o", str(path)], cwd=ROOT, check=True)
    loaded = ctypes.CDLL(str(path))
    for name in ("encode_launch", "decode_launch", "collective_launch"):
        getattr(loaded, name).restype = ctypes.c_bool
    return loaded


@lru_cache
def programs(architecture: str, dtype: torch.dtype, *defines: str, root: Path = ROOT) -> dict[str, Program]:
    """The kernels of kernels.cu for one number type; ``defines`` says which; ``root``: another tree of csrc."""
    path = Path(FOLDER.name) / f"{len(list(Path(FOLDER.name).iterdir()))}.cubin"
    compile_cubin(SOURCE, architecture, path, f"-DTYPE={TYPES[dtype]}", *defines, root=root)
    return read(path)


def setting(codec: Any, numel: int) -> Setting:
    """The codec that serves a row of ``numel`` values, as the kernels know it."""
    return Setting(*codec.fitted(numel).native)


def bits_of(x: Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a tensor."""
    return x.contiguous().view(torch.uint8).numpy()


class Kernels:
    """The kernels of one number type for one architecture. ``counts``: what the last launch did."""

    counts: Counts

    def __init__(self, architecture: str, dtype: torch.dtype, *defines: str, root: Path = ROOT) -> None:
        self.architecture, self.dtype = architecture, dtype
        self.programs = programs(architecture, dtype, *defines, root=root)

    def _run(self, name: str, memory: GlobalMemory, launch: Launch) -> None:
        parameters = bytes(launch.parameters)[: launch.bytes]
        machine = Machine(self.programs[name], self.architecture, memory, parameters, launch.blocks, launch.shared)
        self.counts = machine.run()

    def encode(
        self,
        codec: Any,
        x: Tensor,
        enough: int = 512,
        blocks: int = 4096,
        memory: Tensor | None = None,
        shift: int = 0,
        width: int = 0,
    ) -> Tensor:
        """The payload; ``memory`` is updated. Beyond ``enough`` tiles they grow; at most ``blocks`` thread blocks.

        ``width``: of rows that end inside a super-block.
        """
        space, launch, size = GlobalMemory(), Launch(), codec.wire_bytes(x.numel(), width or None)
        at = space.place(bits_of(x), shift)
        payload = space.place(np.full(size, 0xEE, np.uint8))
        kept = 0 if memory is None else space.place(bits_of(memory))
        limits = (ctypes.c_int64(each) for each in (x.numel(), width, enough, blocks))
        places = (ctypes.c_uint64(place) for place in (at, payload, kept))
        known = setting(codec, width or x.numel())
        assert host().encode_launch(ctypes.byref(known), DTYPES[x.dtype], *limits, *places, ctypes.byref(launch))
        name = FORMATS[known.format].format(codec.bits) if memory is None else "carrying"
        name = "rowed" if width else name
        self._run(f"encode_{name}", space, launch)
        if memory is not None:
            memory.view(torch.uint8).numpy()[:] = space.read(kept, memory.nbytes)
        return torch.from_numpy(space.read(payload, size))

    def decode_sum(
        self,
        codec: Any,
        payloads: Sequence[Tensor],
        numel: int,
        enough: int = 512,
        blocks: int = 1 << 20,
        shift: int = 0,
        width: int = 0,
    ) -> Tensor:
        """The sum of what payloads hold."""
        space, launch = GlobalMemory(), Launch()
        addresses = (ctypes.c_uint64 * len(payloads))(*(space.place(bits_of(payload)) for payload in payloads))
        out = torch.full((numel,), torch.nan, dtype=self.dtype)
        to = space.place(bits_of(out), shift)
        limits = (ctypes.c_int64(each) for each in (numel, width, enough, blocks))
        known, target, count = setting(codec, width or numel), ctypes.c_uint64(to), len(payloads)
        assert host().decode_launch(
            ctypes.byref(known), DTYPES[self.dtype], *limits, addresses, count, target, ctypes.byref(launch)
        )
        self._run(f"decode_{'rowed' if width else FORMATS[known.format].format(codec.bits)}", space, launch)
        return torch.from_numpy(space.read(to, out.nbytes)).view(self.dtype)

    def collective(
        self,
        kind: str,
        codecs: tuple[Any, Any],
        calls: Sequence[Sequence[Tensor]],
        blocks: int = 2,
        region: int = 24576,
    ) -> list[list[Tensor]]:
        """Consecutive collectives of all ranks, each in one launch over the same inboxes; results by call and rank."""
        world = len(calls[0])
        sizes = (ctypes.c_int64 * 5)()
        host().sizes(world, ctypes.c_int64(region), sizes)
        inbox_bytes, own_bytes, control_bytes, error_at, _ = sizes
        space = GlobalMemory(
            sum(x.nbytes * 10 for parts in calls for x in parts) + world * (inbox_bytes + own_bytes) + (1 << 16)
        )
        group = Group(world, blocks, region)
        errors = space.place(np.zeros(world, np.uint64))
        for rank in range(world):
            group.inbox[rank] = space.place(np.zeros(inbox_bytes, np.uint8))
            group.own[rank] = space.place(np.zeros(own_bytes, np.uint8))
        controls = np.zeros((world, control_bytes), np.uint8)
        for rank in range(world):
            controls[rank, error_at : error_at + 8] = np.array([errors + 8 * rank], np.uint64).view(np.uint8)
        first = space.place(controls)
        for rank in range(world):
            group.control[rank] = first + control_bytes * rank
        found = [self._collective(kind, codecs, parts, group, space) for parts in calls]
        assert not space.read(errors, 8 * world).any(), "a flag did not come"
        return found

    def _collective(
        self, kind: str, codecs: tuple[Any, Any], parts: Sequence[Tensor], group: Group, space: GlobalMemory
    ) -> list[Tensor]:
        launch, numel = Launch(), parts[0].numel() * (len(parts) if kind == "all_gather" else 1)
        out = torch.full((numel // len(parts) if kind == "reduce_scatter" else numel,), torch.nan, dtype=self.dtype)
        for rank, part in enumerate(parts):
            group.x[rank], group.out[rank] = space.place(bits_of(part)), space.place(bits_of(out))
        fitted, length = cut(kind, codecs, numel, len(parts))
        legs = [ctypes.byref(Setting(*codec.native)) for codec in fitted]
        sizes = ctypes.c_int64(numel), ctypes.c_int64(length)
        made = host().collective_launch(
            ctypes.byref(group), KINDS[kind], *legs, DTYPES[self.dtype], *sizes, ctypes.byref(launch)
        )
        assert made, "no kernel for these legs"
        self._run("collective_legs", space, launch)
        read = (
            torch.from_numpy(space.read(group.out[rank], out.nbytes)).view(self.dtype) for rank in range(len(parts))
        )
        return list(read)
