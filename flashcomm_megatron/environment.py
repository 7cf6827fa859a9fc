"""The environment variables, all of them. Any other ``FLASH_COMM_*`` name is refused: a typo must not pass unseen."""

from __future__ import annotations

import os
from typing import Any

KNOWN = {
    "FLASH_COMM_BITS": "2 to 8 switches compression on where no command line and no call of enable() does.",
    "FLASH_COMM_FEEDBACK": "auto or off: residual feedback for FLASH_COMM_BITS. Reinforcement learning needs off.",
    "FLASH_COMM_DISABLE": "1 keeps Megatron untouched, whatever flags and scripts ask for. Set it on every rank.",
    "FLASH_COMM_EXTENSION": "0 leaves the compiled extension out: the PyTorch codec gives the same bits, slower.",
}


def check() -> None:
    """Raise ValueError for a ``FLASH_COMM_*`` variable that does not exist."""
    for name in sorted(os.environ):
        if name.startswith("FLASH_COMM_") and name not in KNOWN:
            raise ValueError(f"{name} is no variable of flash-comm: choose {' or '.join(KNOWN)}, or use the flags.")


def is_disabled() -> bool:
    """Whether the kill switch is set."""
    return os.environ.get("FLASH_COMM_DISABLE", "0") not in ("", "0")


def options() -> dict[str, Any]:
    """Options of a configuration that variables ask for; none without FLASH_COMM_BITS.

    ValueError if that is no number; Config knows which numbers and words are right.
    """
    bits, feedback = (os.environ.get(f"FLASH_COMM_{name}", "") for name in ("BITS", "FEEDBACK"))
    if not bits:
        return {}
    if not bits.isdigit():
        raise ValueError(f"FLASH_COMM_BITS={bits} is no number: choose 2 to 8.")
    return {"bits": int(bits)} | ({"feedback": feedback} if feedback else {})
