"""Minimum sizes, from which on compression pays: shipped defaults, or a file measured on the machine that uses it.

``python -m flashcomm_megatron bench --tune`` (tools/tune.py) makes a file, ``--flash-comm-thresholds`` names it; jobs
measure nothing by themselves. It holds one row for each (collective, dtype, bits, recipe) and each topology (so many
ranks on so many machines, over one transport), and says on which hardware and versions it was measured: on others it
is refused. Ranks compare its digest before they use it. What it has no row for gets the default.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import Config
from ..version import __version__

NEVER = 2**62  # bytes: no size measured was worth it

# By transport. CPUs of one machine: benchmarks/bench_collectives.py; CPUs over the process group:
# benchmarks/link_lab.py. GPUs: not measured by us; by the planner's cost with three launches and two of NCCL's calls
# (docs/log.md) 4 bits pay on PCIe from 1 MiB on for every world, on NVLink from 32 to 512 MiB on. A fused kernel needs
# one launch, so there it is what published kernels of this kind reach on either (AMD QuickReduce: 1 to 16 MiB).
DEFAULTS = {"shared memory": 1024, "cpu": 256 * 1024, "cuda": 1024 * 1024, "nvlink": 256 * 1024 * 1024}
MINIMUM_OF_COLLECTIVE = {
    "all_gather": 32 * 1024
}  # of a rank's share: torch.distributed's own is quick while it is small


class Case(NamedTuple):
    """What a minimum size holds for."""

    collective: str
    dtype: str
    bits: int
    recipe: str


def minimum_size(case: Case, topology: str, joined_by: str, config: Config) -> int:
    """Smallest tensor, in bytes, that is compressed between the ranks of ``topology``: a transport, or "nvlink"."""
    if config.min_bytes is not None:
        return config.min_bytes
    tables = read(config.thresholds) if config.thresholds else {}
    default = DEFAULTS.get(joined_by, DEFAULTS["cuda"])  # unknown devices are GPUs
    return tables.get(topology, {}).get(case, max(default, MINIMUM_OF_COLLECTIVE.get(case.collective, 0)))


def topology_of(world: int, nodes: Sequence[int], transport: str) -> str:
    """What a table of a file holds for."""
    return f"{world} ranks, {len(set(nodes))} machines, {transport}"


@lru_cache
def read(path: str) -> dict[str, dict[Case, int]]:
    """The file's rows by topology. ValueError, one sentence, if it is not a file of this machine's."""
    name = f"--flash-comm-thresholds {path}"
    try:
        found = json.loads(Path(path).read_text())
        made = found["circumstances"]
        tables = {
            where: {Case(*row[:4]): int(row[4]) for row in rows}
            for where, rows in found["least bytes by place"].items()
        }
        differing = [f"{key} {made.get(key)}, here {value}" for key, value in here().items() if made.get(key) != value]
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}. {AGAIN}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no file of thresholds ({error!r}). {AGAIN}") from None
    if differing:
        raise ValueError(f"{name} was measured elsewhere ({'; '.join(differing)}). {AGAIN}")
    return tables


def problem(path: str) -> str:
    """Why this rank cannot use the file; empty if it can."""
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return ""


def unwritable(path: Path) -> str:
    """Why :func:`write` could not write to ``path``; empty if it could."""
    if not path.absolute().parent.is_dir():
        return "there is no such folder"
    if path.exists():
        try:
            json.loads(path.read_text())["circumstances"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            return f"there is something else already ({error!r})"
    return "" if os.access(path if path.exists() else path.absolute().parent, os.W_OK) else "it cannot be written"


def write(path: Path, where: str, rows: dict[Case, int]) -> None:
    """Put the ``rows`` of one topology into the file, beside those of others."""
    tables: dict[str, Any] = {}
    if path.exists():
        old = json.loads(path.read_text())
        if old.get("circumstances") == here():
            tables = old["least bytes by place"]
    tables[where] = [[*case, value] for case, value in rows.items()]
    text = json.dumps({"circumstances": here(), "least bytes by place": tables}, indent=1)
    path.write_text(text + "\n")


def here() -> dict[str, Any]:
    """What a measurement depends on and can be compared."""
    cuda = torch.cuda.is_available()
    return {
        "flashcomm_megatron": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "gpus": torch.cuda.device_count() if cuda else 0,
    }


AGAIN = "Measure again with torchrun ... -m flashcomm_megatron bench --tune FILE."
