"""Ranks agree before they compress: no rank encodes in 4 bits what another decodes as 8.

The first use of a group compares version and configuration of all its ranks and refuses any difference on every rank,
with a table of who holds what. A configuration that is new to the group, because of a later ``enable`` say, is compared
in the same way; a rank that did not change is by then in another call, and both hear of it (comm/communicator.py).
A rank that goes back to a configuration compared earlier is not asked again: every message carries its digest.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import lru_cache

import torch

from ..codec.published import ranges
from ..comm import votes
from ..comm.communicator import Call, Communicator
from ..config import Config
from ..version import __version__
from . import minimum_size

TEXT_BYTES = 1024  # every rank sends its description as this many bytes, zero padded; its digest comes first
FIRST = "comparison of configurations at the group's first use (is flash-comm on at every rank?)"
LATER = "change of configuration"


def check(comm: Communicator, config: Config) -> None:
    """Raise RuntimeError on every rank of ``comm`` unless all of them hold ``config``; remembered there."""
    agreed = comm.agreed
    if agreed and agreed[-1] is config:
        return
    if config in agreed:
        agreed.remove(config)
    elif comm.world > 1:
        comm.calls.note(LATER)
        _compare(_gather(comm, config, agreed[-1] if agreed else None), comm.ranks)
    agreed.append(config)


@lru_cache
def digest(config: Config) -> str:
    """A few characters that stand for everything :func:`check` compares."""
    return hashlib.sha256(_options(config).encode()).hexdigest()[:8]


def _compare(texts: list[str], ranks: list[int]) -> None:
    if len(set(texts)) == 1:
        return
    rows = "\n".join(f"  rank {rank}: {text}" for rank, text in zip(ranks, texts, strict=True))
    raise RuntimeError(
        f"flash-comm: the ranks of this group hold different configurations:\n{rows}\n"
        "Give every rank the same flags and the same version."
    )


def _describe(config: Config) -> str:
    return f"flashcomm_megatron {__version__} {digest(config)}: {_options(config)}"


def _options(config: Config) -> str:
    """Version, options and files. A file that only this rank cannot use tells it apart from the others."""
    options = " ".join(f"{name}={value}" for name, value in asdict(config).items() if value is not None)
    if config.calibration is not None:
        options += f" (calibration: {ranges.digest(config.calibration)})"
    if config.thresholds is not None:
        options += f" (thresholds: {minimum_size.problem(config.thresholds) or ranges.digest(config.thresholds)})"
    return f"{__version__} {options}"


def _gather(comm: Communicator, config: Config, before: Config | None) -> list[str]:
    """Every rank's description, in rank order; the message goes where the calls before it went."""
    device = votes.device(comm.group)  # gloo passes messages in main memory only, whatever the tensors' device
    comm.progress.drain()
    call = Call(0, LATER if before else FIRST, 0, comm.seconds(before or config))
    text = _describe(config).encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
    inbox = torch.zeros(comm.world, TEXT_BYTES, dtype=torch.uint8, device=device)
    own = inbox[comm.rank].copy_(torch.tensor(list(text), dtype=torch.uint8))
    comm.transport_if_open(device, before or config).gather(inbox.view(-1), own, call).wait()
    return [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in inbox]
