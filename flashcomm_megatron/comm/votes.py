"""Ranks decide together: short messages as bytes over the process group, and votes that no rank can miss.

Whatever can fail on one rank alone is tried by all, then voted on; all go on or all fall back. Nothing is pickled.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

MESSAGE_BYTES = 256


def gather(message: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Every rank's message of at most 254 bytes, in rank order."""
    if len(message) > MESSAGE_BYTES - 2:
        message = message[: MESSAGE_BYTES - 2]
    padded = len(message).to_bytes(2, "little") + message.ljust(MESSAGE_BYTES - 2, b"\0")
    mine = torch.tensor(list(padded), dtype=torch.uint8, device=device(group))
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    received = [bytes(each.tolist()) for each in everyone]
    return [each[2 : 2 + int.from_bytes(each[:2], "little")] for each in received]


def failure(mine: str, group: dist.ProcessGroup) -> str:
    """Why the first rank that failed did, the same text on every rank; empty if none did."""
    for rank, reason in enumerate(gather(mine.encode(), group)):
        if reason:
            return f"rank {dist.get_global_rank(group, rank)}: {reason.decode(errors='replace')}"
    return ""


def device(group: dist.ProcessGroup) -> torch.device:
    """Where this group's backend wants its tensors."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
