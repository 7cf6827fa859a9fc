"""Put every row of the table in force, and take it back.

Rows of names that must exist are applied at once, all or none. Rows that wait (training_log.py, arguments.py, counters)
are applied when the script imports their module, and never import it themselves.
"""

from __future__ import annotations

from functools import partial

from packaging.version import Version

from ..config import Config, check_environment, current, is_disabled, set_current
from ..observe import messages
from . import coverage, feedback, patching, seams, training_log, transformer_engine
from .patching import PatchError, Seam
from .when_imported import when_imported

OLDEST = (0, 13)  # megatron-core; the first whose layers hand their process group to every collective
_is_installed = False


def rows(with_tokens: bool = False) -> tuple[Seam, ...]:
    """The rows that must fit what is installed. PatchError if Megatron is not."""
    return seams.rows_of(megatron_version(), transformer_engine.is_present(), with_tokens)


def install(experts: bool = False, why: str = "") -> None:
    """Replace every name of the table and announce it at the next forward. Idempotent.

    ``experts``: with the all-to-all of experts' tokens. ``why``: the end of the line that is printed. Raises PatchError
    if Megatron is missing, too old, or does not fit; ValueError for an unknown environment variable.
    """
    global _is_installed
    check_environment()
    if is_disabled():
        messages.say("flash-comm: off, because FLASH_COMM_DISABLE is set.")
        return
    version = megatron_version()
    if Version(version).release < OLDEST:
        raise PatchError(
            f"flash-comm needs megatron-core >= 0.13 (found {version}): "
            "before 0.13 tensor_parallel.mappings._reduce takes no group."
        )
    found = rows(experts)
    patching.apply(found)
    if not experts:
        patching.revert(seams.TOKENS)
    _is_installed = True
    for seam in seams.COUNTED:
        when_imported(seam.module, partial(_count, seam))
    training_log.install()
    coverage.start(f"{len(found)} names patched in megatron-core {version}{why}")


def switch_on(config: Config, why: str = "") -> None:
    """Put ``config`` in force and install; where that fails, what was in force before is again."""
    before = current()
    set_current(config)
    try:
        install(config.experts, why)
    except Exception:
        set_current(before)
        raise


def uninstall() -> None:
    """Restore every object and free all memory; PatchError if somebody patched over one of the names since."""
    global _is_installed
    patching.revert(seams.EVERY)
    _is_installed = False
    training_log.uninstall()
    coverage.stop()
    feedback.forget()


def _count(seam: Seam) -> None:
    """Apply a counter; a version without its name needs none."""
    if _is_installed:
        patching.apply_late(seam)


def megatron_version() -> str:
    """Version of the megatron-core that imports; PatchError with the reason if none does."""
    try:
        import megatron.core
    except ImportError as error:
        raise PatchError(f"flash-comm needs megatron-core >= 0.13, which cannot be imported: {error}.") from error
    return str(megatron.core.__version__)
