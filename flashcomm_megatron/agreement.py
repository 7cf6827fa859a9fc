"""Ranks agree before they compress: the first use of a group compares version and configuration of all its ranks.

A rank that encodes in 4 bits while its peer decodes 8 would produce garbage or a hang, so any difference is refused on
every rank, with a table of who holds what. The check is one small all_gather for each new (group, configuration).
"""

from __future__ import annotations

from dataclasses import asdict
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from . import ranges
from .config import Config
from .version import __version__

TEXT_BYTES = 1024  # every rank sends its description as this many bytes, zero padded

_agreed: WeakKeyDictionary[dist.ProcessGroup, Config] = WeakKeyDictionary()


def check(group: dist.ProcessGroup, config: Config, device: torch.device) -> None:
    """Raise RuntimeError on every rank of ``group`` unless all of them hold ``config``; remembered per group."""
    if _agreed.get(group) is config:
        return
    if group.size() > 1 and _agreed.get(group) != config:
        texts = _gather(_describe(config), group, device)
        if len(set(texts)) > 1:
            rows = "\n".join(f"  rank {dist.get_global_rank(group, i)}: {text}" for i, text in enumerate(texts))
            raise RuntimeError(
                f"flash-comm: the ranks of this group hold different configurations:\n{rows}\n"
                "Give every rank the same flags and the same version."
            )
    _agreed[group] = config


def _describe(config: Config) -> str:
    options = " ".join(f"{name}={value}" for name, value in asdict(config).items() if value is not None)
    if config.calibration is not None:
        options += f" sha256={ranges.digest(config.calibration)}"
    return f"flashcomm_megatron {__version__}: {options}"


def _gather(text: str, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Every rank's text, in rank order."""
    mine = torch.tensor(list(text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    return [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in everyone]
