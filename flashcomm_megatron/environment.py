"""The environment variables, all of them. Any other ``FLASH_COMM_*`` name is refused: a typo must not pass unseen."""

from __future__ import annotations

import os

KNOWN = {
    "FLASH_COMM_BITS": "2 to 8 switches compression on where no command line and no call of enable() does.",
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


def bits() -> int | None:
    """What FLASH_COMM_BITS says; None if it is not set. ValueError if it is no number; Config knows which are right."""
    text = os.environ.get("FLASH_COMM_BITS", "")
    if text and not text.isdigit():
        raise ValueError(f"FLASH_COMM_BITS={text} is no number: choose 2 to 8.")
    return int(text) if text else None
