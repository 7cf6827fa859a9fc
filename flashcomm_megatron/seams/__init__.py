"""Every Megatron name we replace, as tables of rows, and switching all of them on and off.

One file a table, each row with the reason why that name reaches its callers:

    where.py          which layer is running: notes the site, compresses nothing
    forward.py        Megatron-Core's collectives of activations
    gradients.py      and of gradients, in backward

``differentiable.py`` holds what takes their place. A new table is a file with ``ROWS`` and a place in ``TABLES``.
"""

from __future__ import annotations

from packaging.version import Version

from .. import announce, environment, patching, training_log
from ..patching import PatchError, Seam
from . import forward, gradients, where
from .differentiable import Call
from .where import observe

__all__ = ["SEAMS", "TABLES", "Call", "install", "megatron_version", "observe", "uninstall"]

OLDEST = (0, 13)  # megatron-core; the first whose layers hand their process group to every collective
TABLES = (where.ROWS, forward.ROWS, gradients.ROWS)
SEAMS: tuple[Seam, ...] = tuple(row for table in TABLES for row in table)


def install() -> None:
    """Replace every name of the tables and announce it at the next forward. Idempotent.

    Raises PatchError if Megatron is missing, too old, or does not fit; ValueError for an unknown environment variable.
    """
    environment.check()
    if environment.is_disabled():
        announce.say("flash-comm: off, because FLASH_COMM_DISABLE is set.")
        return
    version = megatron_version()
    if Version(version).release < OLDEST:
        raise PatchError(
            f"flash-comm needs megatron-core >= 0.13 (found {version}): "
            "before 0.13 tensor_parallel.mappings._reduce takes no group."
        )
    patching.apply(SEAMS)
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    training_log.install()
    announce.start(f"{len(SEAMS)} names patched in megatron-core {version}", RowParallelLinear)


def uninstall() -> None:
    """Restore every object; PatchError if somebody patched over one of them since."""
    patching.revert(SEAMS)
    training_log.uninstall()
    announce.stop()


def megatron_version() -> str:
    """Version of the megatron-core that imports; PatchError with the reason if none does."""
    try:
        import megatron.core
    except ImportError as error:
        raise PatchError(f"flash-comm needs megatron-core >= 0.13, which cannot be imported: {error}.") from error
    return str(megatron.core.__version__)
