"""The scalars of a local W&B run, read from its ``run-ID.wandb`` file without the service.

The file is what wandb itself uploads from, so it is there for offline, running and crashed runs alike. It is a LevelDB
log of protobuf records::

    file    7 bytes of header (":W&B", magic, version), then chunks in blocks of 32 KiB
    chunk   crc32 (4 bytes), length (2), kind (1), data; 6 bytes or fewer at the end of a block are padding
    kind    1 whole record, 2 first part, 3 middle part, 4 last part

``wandb leet inspect`` prints the same, but only the newest releases have it; the format is that of every release since
0.10. What follows a torn chunk cannot be trusted and is left out.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

IDENT, HEADER, BLOCK, CHUNK = b":W&B", 7, 32 * 1024, 7
WHOLE, LAST = 1, 4


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """(config, rows with ``_step`` and ``_timestamp``, whether the file ends where a record ends).

    ImportError without wandb, whose protobuf schema this needs; ValueError if it is no such file.
    """
    from wandb.proto import wandb_internal_pb2 as schema

    data = path.read_bytes()
    if data[:4] != IDENT:
        raise ValueError("it holds no W&B records (the run may have died before its first line)")
    config: dict[str, Any] = {}
    rows, end = [], HEADER
    for content, behind in records(data):
        record, end = schema.Record.FromString(content), behind
        _merge(config, [*record.run.config.update, *record.config.update])
        if record.HasField("history"):
            row: dict[str, Any] = {}
            _merge(row, record.history.item)
            rows.append({"_step": record.history.step.num} | row)
    return config, rows, end == len(data)


def records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each whole record and the offset behind it, up to the first chunk that is torn or damaged."""
    place, record = HEADER, b""
    while place + CHUNK <= len(data):
        room = BLOCK - place % BLOCK
        if room < CHUNK:
            place += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + CHUNK : place + CHUNK + length]
        if len(part) < length or zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return
        place += CHUNK + length
        record += part
        if kind in (WHOLE, LAST):
            yield record, place
            record = b""


def _merge(into: dict[str, Any], items: Iterable[Any]) -> None:
    """Set every (key or nested key, JSON value) of ``items``."""
    for item in items:
        *path, last = item.nested_key or [item.key]
        inner = into
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
