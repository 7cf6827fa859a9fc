"""Measurements in place of assumptions: a codec's speed from make gpu-check, a link and a step from a link lab.

A link lab's JSON: ``rate_bits_per_second`` of each rank's link, ``latency_seconds`` of one exchange,
``compute_seconds`` of a step, ``encode_gbytes_per_second`` and ``decode_gbytes_per_second`` of values on one rank.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from .cost import Speed
from .hardware import GB, Link
from .models import json_object

GPU_CHECKS = Path("benchmarks/results/gpu-check")  # below the current folder
LAB = ("rate_bits_per_second", "latency_seconds", "compute_seconds",
       "encode_gbytes_per_second", "decode_gbytes_per_second")  # fmt: skip


class Lab(NamedTuple):
    """What a link lab measured: the link, and bytes of values a second that the codec encodes and decodes."""

    link: Link
    compute_seconds: float
    encode: float
    decode: float


def lab(path: Path) -> Lab:
    """Read a link lab's JSON; ValueError naming what is missing."""
    found = json_object(path)
    for name in LAB:
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"{path}: {name} should be a number, found {value!r}.")
    rate, latency, compute, encode, decode = (float(found[name]) for name in LAB)
    return Lab(link(rate / 8, latency, str(path)), compute, encode * GB, decode * GB)


def link(rate: float, latency: float, source: str) -> Link:
    """A link of ``rate`` bytes per second from each rank, whose exchanges each wait ``latency`` seconds."""
    return Link(rate, source, 0.0, source, codec_latency=0.0, step=latency)


def gpu_check(path: Path, bits: int) -> Speed:
    """Speed of the codec at ``bits`` in a gpu_check.json: the last bf16 row at that width, the largest tensor."""
    try:
        rows = json_object(path)["measured"]["codec"]
        row = [row for row in rows if row.get("bits") == bits and row.get("dtype") == "bfloat16"][-1]
        return Speed(row["encode GB/s"] * GB, row["decode GB/s"] * GB)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path}: no codec of {bits} bits in bfloat16 was measured there: make gpu-check.") from None


def find_gpu_check(gpu: str, folder: Path = GPU_CHECKS) -> Path | None:
    """A gpu_check.json in ``folder`` made on this kind of GPU."""
    for path in sorted(folder.rglob("*.json")):
        machine = json_object(path).get("machine")
        words = set(re.split("[ -]", str(machine.get("gpu")))) if isinstance(machine, dict) else set()
        if words >= set(gpu.split("-")) and ("PCIe" in words) == ("PCIe" in gpu):
            return path
    return None
