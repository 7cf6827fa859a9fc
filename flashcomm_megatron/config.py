"""The configuration: one frozen dataclass. Only ``bits`` is ever needed; the rest has measured defaults.

Each field's help becomes the help of its ``--flash-comm-*`` flag. Every rank must hold an equal configuration:
it decides, together with shape and dtype alone, which branch a call takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .recipes import RECIPES, Legs

TRANSPORTS = ("auto", "group")
ALGORITHMS = ("auto", "one-step", "two-step")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """How tensor-parallel sums and gathers travel. Raises ValueError for a value that no recipe knows."""

    bits: int = field(
        metadata={"help": "Bits per value on the wire, 2 to 8, of tensor-parallel sums and gathers. Switches flash-comm on."}
    )
    recipe: str = _option("auto", "Number format and algorithm: auto (best measured) or a published method.")
    block: int | None = _option(None, "Values that share one scale. Smaller is more accurate and costs more bytes.")
    min_bytes: int | None = _option(
        None, "Leave tensors of fewer bytes than this to the original collective. Default: where compression starts to pay."
    )
    transport: str = _option("auto", "How bytes move: group uses the process group (NCCL or gloo).")
    algorithm: str = _option("auto", "All-reduce as one-step (one rounding) or two-step (least bytes beyond 2 ranks).")
    strict: bool = _option(False, "Turn the warning that nothing was quantized into an error.")
    log_interval: int | None = _option(
        None, "Iterations between two lines of metrics. Default: Megatron's --log-interval."
    )
    metrics: str | None = _option(None, "Also write the metrics, with the loss, to this file of JSON lines.")

    def __post_init__(self) -> None:
        _check(self.bits in range(2, 9), "bits", self.bits, "2 to 8")
        _check(self.recipe in RECIPES, "recipe", self.recipe, ", ".join(RECIPES))
        widths = RECIPES[self.recipe].widths
        _check(self.bits in widths, "bits", self.bits, f"{_list(widths)} with recipe {self.recipe}")
        _check(self.block is None or (self.block > 0 and self.block % 8 == 0), "block", self.block, "a multiple of 8")
        _check(self.min_bytes is None or self.min_bytes >= 0, "min-bytes", self.min_bytes, "0 or more")
        positive = self.log_interval is None or self.log_interval > 0
        _check(positive, "log-interval", self.log_interval, "1 or more")
        _check(self.transport in TRANSPORTS, "transport", self.transport, ", ".join(TRANSPORTS))
        _check(self.algorithm in ALGORITHMS, "algorithm", self.algorithm, ", ".join(ALGORITHMS))
        try:
            _ = self.legs
        except ValueError as error:  # a format has its own limits, for example on blocks
            raise ValueError(f"--flash-comm-{error}") from None

    @property
    def legs(self) -> Legs:
        """The codecs of both legs."""
        row = RECIPES[self.recipe]
        return row.legs(self.bits, self.block or row.block)


def _check(holds: bool, name: str, found: Any, choices: str) -> None:
    if not holds:
        raise ValueError(f"--flash-comm-{name} {found}: choose {choices}.")


def _list(widths: tuple[int, ...]) -> str:
    return ", ".join(map(str, widths[:-1])) + f" or {widths[-1]}"


_current: Config | Callable[[], Config] | None = None


def set_current(source: Config | Callable[[], Config] | None) -> None:
    """Set what :func:`current` returns: a config, a function called once when it is first needed, or None for off."""
    global _current
    _current = source


def current() -> Config | None:
    """The configuration in force, or None when flash-comm is off."""
    global _current
    if callable(_current):
        _current = _current()
    return _current
