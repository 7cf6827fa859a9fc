"""From how many bytes on compression pays: shipped defaults, or a file measured on the very machine that uses it.

A file is made by ``python -m flashcomm_megatron bench --tune`` (tuning.py) and named by ``--flash-comm-thresholds``;
jobs measure nothing by themselves. It holds one row for each (collective, dtype, bits, recipe) on one number of ranks,
and says on which hardware and versions it was measured: on others it is refused. Ranks compare its digest before they
use it. What it has no row for gets the default.
"""

from __future__ import annotations

import json
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .config import Config
from .version import __version__

NEVER = 2**62  # bytes: no size measured was worth it

# Ranks of one CPU machine, which share memory: benchmarks/bench_collectives.py. Other CPU groups: link_lab.py, there.
# GPUs: not measured by us; the smallest size at which published kernels of this kind win on fp16 (AMD QuickReduce's
# table, 1 to 16 MiB by number of ranks).
DEFAULTS = {"shared memory": 1024, "cpu": 256 * 1024, "cuda": 1024 * 1024}


class Case(NamedTuple):
    """What a threshold holds for."""

    collective: str
    dtype: str
    bits: int
    recipe: str


def least(case: Case, world: int, place: str, config: Config) -> int:
    """Smallest tensor, in bytes, that is compressed. ``place``: a key of ``DEFAULTS``; unknown devices are GPUs."""
    if config.min_bytes is not None:
        return config.min_bytes
    measured = read(config.thresholds, world) if config.thresholds else {}
    return measured.get(case, DEFAULTS.get(place, DEFAULTS["cuda"]))


@lru_cache
def read(path: str, world: int) -> dict[Case, int]:
    """The file's rows for ``world`` ranks. ValueError, one sentence, if it is not a file of this machine's."""
    name = f"--flash-comm-thresholds {path}"
    try:
        found = json.loads(Path(path).read_text())
        made, tables = found["circumstances"], found["least bytes by ranks"]
        rows = {Case(*row[:4]): int(row[4]) for row in tables.get(str(world), [])}
        differing = [f"{key} {made.get(key)}, here {value}" for key, value in here().items() if made.get(key) != value]
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}. {AGAIN}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no file of thresholds ({error!r}). {AGAIN}") from None
    if differing:
        raise ValueError(f"{name} was measured elsewhere ({'; '.join(differing)}). {AGAIN}")
    return rows


def problem(path: str) -> str:
    """Why this rank cannot use the file; empty if it can."""
    try:
        read(path, 0)
    except ValueError as error:
        return str(error)
    return ""


def write(path: Path, world: int, rows: dict[Case, int]) -> None:
    """Put ``rows`` for ``world`` ranks into the file, beside those for other numbers of ranks."""
    tables: dict[str, Any] = {}
    if path.exists():
        old = json.loads(path.read_text())
        if old.get("circumstances") == here():
            tables = old["least bytes by ranks"]
    tables[str(world)] = [[*case, value] for case, value in rows.items()]
    text = json.dumps({"circumstances": here(), "least bytes by ranks": tables}, indent=1)
    path.write_text(text + "\n")


def here() -> dict[str, Any]:
    """What a measurement depends on and can be compared."""
    cuda = torch.cuda.is_available()
    return {
        "flashcomm_megatron": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "gpus": torch.cuda.device_count() if cuda else 0,
    }


AGAIN = "Measure again with torchrun ... -m flashcomm_megatron bench --tune FILE."
