"""The calibration file: what every rank's partial sums ranged over, at every row-parallel layer of one model.

It is a safetensors file. Each tensor has the name of a layer inside the model and holds float32
[2, ranks, features]: the minima, then the maxima. The header's metadata say what the file is::

    format "flashcomm_megatron calibration"   version "1"   package "0.1.0"   ranks "8"   batches "32"

Layer names, features and ranks are the model's fingerprint. A file that does not fit is refused with one sentence.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...version import __version__

FORMAT = "flashcomm_megatron calibration"
VERSION = "1"
AGAIN = "Calibrate again with python -m flashcomm_megatron calibrate SCRIPT ... --out FILE."


class Ranges(NamedTuple):
    """A calibration file in memory."""

    path: str
    ranks: int  # tensor-parallel ranks
    layers: Mapping[str, Tensor]  # name -> float32 [2, ranks, features]


def save(path: str, layers: Mapping[str, Tensor], batches: int) -> None:
    """Write the finite ranges [2, ranks, features] of every layer."""
    ranks = next(iter(layers.values())).size(1)
    told = {"format": FORMAT, "version": VERSION, "package": __version__, "ranks": str(ranks), "batches": str(batches)}
    header: dict[str, Any] = {"__metadata__": told}
    data, end = [], 0
    for name, ranges in layers.items():
        values = ranges.float().contiguous()
        data.append(ctypes.string_at(values.data_ptr(), values.nbytes))
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def check_finite(layers: Mapping[str, Tensor]) -> None:
    """ValueError if a range is not finite: the calibration run was broken."""
    for name, values in layers.items():
        if not values.isfinite().all():
            raise ValueError(f"layer {name} met a NaN or an Inf, so its ranges mean nothing.")


@cache
def load(path: str) -> Ranges:
    """The file at ``path``; ValueError, one sentence, if it is missing, broken, not a calibration, or not version 1."""
    header, data = _read(path)
    told = header.pop("__metadata__", None) or {}
    if told.get("format") != FORMAT:
        raise ValueError(f"--flash-comm-calibration {path} is a safetensors file but no calibration. {AGAIN}")
    if told.get("version") != VERSION:
        raise ValueError(
            f"--flash-comm-calibration {path} has version {told.get('version')}, this package reads {VERSION}. {AGAIN}"
        )
    expected = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if len(data) != expected:
        raise ValueError(
            f"--flash-comm-calibration {path} is cut short: {len(data)} of {expected} bytes of data. {AGAIN}"
        )
    try:
        ranks = int(told["ranks"])
        return Ranges(path, ranks, {name: _tensor(entry, data, ranks) for name, entry in header.items()})
    except (ValueError, RuntimeError, LookupError, TypeError, OverflowError) as error:
        raise ValueError(f"--flash-comm-calibration {path} is damaged: {error}. {AGAIN}".replace("\n", " ")) from None


@cache
def digest(path: str) -> str:
    """First 16 hexadecimal digits of the file's SHA-256, or why it cannot be read: what ranks compare."""
    try:
        return f"sha256={hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
    except OSError as error:
        return str(error.strerror)


def check(ranges: Ranges, layers: Mapping[str, int], ranks: int) -> None:
    """ValueError, one sentence, unless the file was made for a model of ``layers`` (name -> features) on ``ranks``."""
    name = f"--flash-comm-calibration {ranges.path} was made for"
    if ranges.ranks != ranks:
        raise ValueError(f"{name} {ranges.ranks} tensor-parallel ranks, this model has {ranks}. {AGAIN}")
    for layer, values in ranges.layers.items():
        if layer not in layers:
            raise ValueError(f"{name} another model: this one has no row-parallel layer {layer}. {AGAIN}")
        if values.size(2) != layers[layer]:
            raise ValueError(f"{name} {values.size(2)} features at {layer}, this model has {layers[layer]}. {AGAIN}")


def _read(path: str) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"--flash-comm-calibration {path}: {error.strerror}. {AGAIN}") from None
    try:
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:end])
        _ = [entry["data_offsets"][1] + 0 for name, entry in header.items() if name != "__metadata__"]
        _ = header.get("__metadata__", {}).items()
    except (struct.error, ValueError, OverflowError, AttributeError, TypeError, LookupError):
        raise ValueError(f"--flash-comm-calibration {path} is not a safetensors file, or cut short. {AGAIN}") from None
    return header, content[end:]


def _tensor(entry: dict[str, Any], data: bytes, ranks: int) -> Tensor:
    """One layer's ranges. Whatever is wrong with them raises."""
    start, end = entry["data_offsets"]
    features = entry["shape"][-1]
    if entry["dtype"] != "F32" or entry["shape"] != [2, ranks, features] or not 0 <= start < end <= len(data):
        raise ValueError(f"expected F32 of [2, {ranks}, features], found {entry}")
    values = torch.frombuffer(bytearray(data[start:end]), dtype=torch.float32).view(entry["shape"])
    if not values.isfinite().all():
        raise ValueError("a range is no number")
    return values
