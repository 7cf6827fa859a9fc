"""Every Megatron name we replace, as tables of rows, and switching all of them on and off.

One file a table, each row with the reason why that name reaches its callers:

    where.py                which layer is running: notes the site, compresses nothing
    forward.py              Megatron-Core's collectives of activations
    gradients.py            and of gradients, in backward
    experts.py              the tokens of a mixture of experts, on request
    transformer_engine.py   Transformer Engine's layers, where it is installed
    inference.py            Megatron's inference-optimized layers, which need Transformer Engine

``differentiable.py`` holds what takes their place, ``modes.py`` where it may not. A new table is a file with ``ROWS``
and a place in ``TABLES``.
"""

from __future__ import annotations

from packaging.version import Version

from .. import environment
from ..observe import messages as announce
from . import context as where
from . import experts, forward, gradients, inference, patching, training_log, transformer_engine
from .context import observe
from .patching import PatchError, Seam

__all__ = ["SEAMS", "TABLES", "install", "megatron_version", "observe", "rows", "rows_of", "uninstall"]

OLDEST = (0, 13)  # megatron-core; the first whose layers hand their process group to every collective
TABLES = (where.ROWS, forward.ROWS, gradients.ROWS, experts.ROWS)
SEAMS: tuple[Seam, ...] = tuple(row for table in TABLES for row in table)
OPTIONAL: tuple[Seam, ...] = (*transformer_engine.ROWS, *inference.ROWS, *inference.SINCE_0_17)


def rows() -> tuple[Seam, ...]:
    """The rows of every table whose package is installed. PatchError if Megatron is not."""
    return rows_of(megatron_version(), transformer_engine.is_present())


def rows_of(version: str, with_transformer_engine: bool) -> tuple[Seam, ...]:
    """The rows for a version of Megatron-Core, with or without Transformer Engine."""
    if not with_transformer_engine:
        return SEAMS
    return (*SEAMS, *transformer_engine.ROWS, *inference.rows(Version(version).release))


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
    found = rows()
    patching.apply(found)
    training_log.install()
    announce.start(f"{len(found)} names patched in megatron-core {version}", _reached())


def uninstall() -> None:
    """Restore every object; PatchError if somebody patched over one of them since."""
    patching.revert((*SEAMS, *OPTIONAL))
    training_log.uninstall()
    announce.stop()


def _reached() -> tuple[type, ...]:
    """The row-parallel layers whose communication passes by our names."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    if not transformer_engine.is_present():
        return (RowParallelLinear,)
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    return RowParallelLinear, TERowParallelLinear


def megatron_version() -> str:
    """Version of the megatron-core that imports; PatchError with the reason if none does."""
    try:
        import megatron.core
    except ImportError as error:
        raise PatchError(f"flash-comm needs megatron-core >= 0.13, which cannot be imported: {error}.") from error
    return str(megatron.core.__version__)
