"""The configuration: one frozen dataclass, which one is in force, and the environment variables.

Only ``bits`` is ever needed; the rest has measured defaults. Each field's help becomes the help of its
``--flash-comm-*`` flag. Every rank must hold an equal configuration: it decides, together with shape and dtype alone,
which branch a call takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

from .codec.planes import WIDTHS
from .codec.recipes import RECIPES, Legs

TRANSPORTS = ("auto", "group", "shared-memory", "peer", "host")
ALGORITHMS = ("auto", "one-step", "two-step", "hierarchical")
FEEDBACK = ("auto", "off")
LAYERS_A_BIT = 15  # a model's last sum takes a bit more for every so many layers: 1/30 bit a value of the whole model
PREFIX = "flash_comm_"  # of an option's name in a namespace of arguments
BITS = f"{WIDTHS[0]} to {WIDTHS[-1]}"
EXACT = 16  # grad_bits that leave gradients to the original collectives
TYPES = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "None": (type(None),)}  # a field's words


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """How tensor-parallel sums and gathers travel. Raises ValueError for a value that no recipe knows."""

    bits: int = field(
        metadata={
            "help": f"Bits per value, {BITS}, of tensor-parallel sums and gathers on the wire. Switches compression on."
        }
    )
    recipe: str = _option("auto", "Number format and algorithm: auto (ours, the most accurate) or a published method.")
    block: int | None = _option(None, "Values that share one scale. Smaller is more accurate and sends more bytes.")
    min_bytes: int | None = _option(
        None,
        "Tensors of fewer bytes go through Megatron's own collective. Default: the size from which compression pays.",
    )
    thresholds: str | None = _option(None, "File of minimum sizes measured on this machine, made by bench --tune.")
    feedback: str = _option(
        "auto",
        "Residual feedback in evaluation and inference: auto (where a layer was measured to add its sums to its input "
        "unchanged) or off. Reinforcement learning needs off: old log-probabilities must equal the training forward's.",
    )
    transport: str = _option(
        "auto",
        "How bytes move: group (the process group: NCCL, gloo); inside a machine also shared-memory (CPUs), "
        "peer (GPU memory) or host (pinned memory of GPUs).",
    )
    algorithm: str = _option(
        "auto",
        "All-reduce as one-step (one rounding), two-step (least bytes beyond 2 ranks), or hierarchical (several nodes: "
        "exact within a node, quantized between nodes).",
    )
    timeout: float | None = _option(
        None, "Seconds a rank waits for one that sends nothing. Default: the process group's timeout."
    )
    last_bits: int | None = _option(
        None,
        "Bits per value of a model's last sum, whose error no later sum can repay. Default: one more than the other "
        f"sums' for every {LAYERS_A_BIT} layers, at most {WIDTHS[-1]}. Only for recipe auto.",
    )
    grad_bits: int = _option(8, f"Bits per value of gradients in backward, {BITS}; {EXACT} sends them uncompressed.")
    experts: bool = _option(False, "Also compress the tokens of a mixture of experts (all-to-all dispatcher).")
    calibration: str | None = _option(None, "File of calibrated ranges, made by calibrate. Only for recipe outlier.")
    strict: bool = _option(False, "Fail instead of falling back to an uncompressed collective or a slower transport.")
    log_interval: int | None = _option(
        None, "Log metrics every so many iterations. Default: Megatron's --log-interval."
    )
    metrics: str | None = _option(None, "Also write metrics and losses to this file, as JSON lines.")

    text: ClassVar[str]  # set for each: all of it as a line of JSON, for a compiled graph (collectives/compile.py)

    def __post_init__(self) -> None:
        self._check_types()
        _check(self.bits in WIDTHS, "bits", self.bits, BITS)
        _check(self.recipe in RECIPES, "recipe", self.recipe, ", ".join(RECIPES))
        widths = RECIPES[self.recipe].widths
        _check(self.bits in widths, "bits", self.bits, f"{_list(widths)} with recipe {self.recipe}")
        _check(self.block is None or (self.block > 0 and self.block % 8 == 0), "block", self.block, "a multiple of 8")
        _check(self.min_bytes is None or self.min_bytes >= 0, "min-bytes", self.min_bytes, "0 or more")
        _check(self.timeout is None or 0 < self.timeout <= 1e7, "timeout", self.timeout, "seconds, more than 0, to 1e7")
        positive = self.log_interval is None or self.log_interval > 0
        _check(positive, "log-interval", self.log_interval, "1 or more")
        _check(self.transport in TRANSPORTS, "transport", self.transport, ", ".join(TRANSPORTS))
        _check(self.algorithm in ALGORITHMS, "algorithm", self.algorithm, ", ".join(ALGORITHMS))
        _check(self.feedback in FEEDBACK, "feedback", self.feedback, ", ".join(FEEDBACK))
        self._check_with_recipe()
        try:
            _ = self.legs, self.gradient_legs
        except ValueError as error:  # a format has its own limits, for example on blocks
            raise ValueError(f"--flash-comm-{error}") from None
        object.__setattr__(self, "text", json.dumps(asdict(self)))

    def _check_types(self) -> None:
        for each in fields(self):
            found, words = getattr(self, each.name), str(each.type).split(" | ")
            fits = any(type(found) in TYPES[word] for word in words)
            name = each.name.replace("_", "-")
            _check(fits, name, repr(found), f"{' or '.join(words)}, not {type(found).__name__}")

    def _check_with_recipe(self) -> None:
        row, last = RECIPES[self.recipe], self.last_bits
        if last is not None:
            _check(last in row.widths, "last-bits", last, _list(row.widths))
            _check(last >= self.bits, "last-bits", last, f"{self.bits} or more")
            if not row.feedback:
                raise ValueError(f"--flash-comm-last-bits {last} does nothing with recipe {self.recipe}.")
        widths = (*RECIPES[self._gradient_recipe].widths, EXACT)
        choices = f"{_list(widths)} with recipe {self._gradient_recipe}"
        _check(self.grad_bits in widths, "grad-bits", self.grad_bits, choices)
        if row.calibrated and self.calibration is None:
            raise ValueError(
                f"--flash-comm-recipe {self.recipe} needs --flash-comm-calibration FILE: "
                "make one with python -m flashcomm_megatron calibrate SCRIPT ... --out FILE."
            )
        if self.calibration is not None and not row.calibrated:
            raise ValueError(
                f"--flash-comm-calibration {self.calibration} does nothing with recipe {self.recipe}: "
                "add --flash-comm-recipe outlier."
            )

    @property
    def legs(self) -> Legs:
        """The codecs of both legs. A calibrated recipe has another reduce leg at every site."""
        return self.legs_of(self.bits)

    def last_sum(self, layers: int) -> int:
        """Bits of the last sum of a model of ``layers`` layers: more only where a recipe repays all other errors."""
        if not RECIPES[self.recipe].feedback:
            return self.bits
        return self.last_bits or min(self.bits + layers // LAYERS_A_BIT, WIDTHS[-1])

    def legs_of(self, bits: int) -> Legs:
        """The codecs of both legs at another width."""
        row = RECIPES[self.recipe]
        return row.legs(bits, self.block or row.block)

    @cached_property
    def gradient_legs(self) -> Legs | None:
        """The codecs of both legs for gradients, None where they stay exact."""
        if self.grad_bits == EXACT:
            return None
        row = RECIPES[self._gradient_recipe]
        return row.legs(self.grad_bits, self.block or row.block)

    @property
    def _gradient_recipe(self) -> str:
        """Ranges are calibrated for activations, not for gradients, which then travel as ours."""
        return "auto" if RECIPES[self.recipe].calibrated else self.recipe


def _check(holds: bool, name: str, found: Any, choices: str) -> None:
    if not holds:
        raise ValueError(f"--flash-comm-{name} {found}: choose {choices}.")


def _list(widths: tuple[int, ...]) -> str:
    *most, last = map(str, widths)
    return f"{', '.join(most)} or {last}" if most else last


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


_finished: tuple[Any, dict[str, Any]] | None = None  # a namespace, and its options when it was finished


def finish(namespace: Any) -> None:
    """Remember finished arguments: what they say now is in force, what they say later is not."""
    global _finished
    _finished = namespace, _options_of(namespace)


def changed() -> str | None:
    """Which option of finished arguments somebody changed since, without effect; None: nobody did."""
    namespace, before = _finished or (None, {})
    for name, said in _options_of(namespace).items() if namespace is not None else ():
        if said != before.get(name):
            return (
                f"{name} was changed from {before.get(name)} to {said} after set_args, which does nothing. "
                "Change it before, or call flashcomm_megatron.enable() on every rank."
            )
    return None


def _options_of(namespace: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(namespace).items() if name.startswith(PREFIX)}


# ---- environment variables, all of them ------------------------------------------------------------------------

VARIABLES = {
    "FLASH_COMM_BITS": f"{BITS} switches compression on where no command line and no call of enable() does.",
    "FLASH_COMM_FEEDBACK": "auto or off: residual feedback for FLASH_COMM_BITS. Reinforcement learning needs off.",
    "FLASH_COMM_DISABLE": "1 keeps Megatron untouched, whatever flags and scripts ask for. Set it on every rank.",
    "FLASH_COMM_EXTENSION": "0 leaves the compiled extension out: the PyTorch codec gives the same bits, slower.",
}


def check_environment() -> None:
    """Raise ValueError for a ``FLASH_COMM_*`` variable that does not exist or does nothing: it must not pass unseen."""
    for name in sorted(os.environ):
        if name.startswith("FLASH_COMM_") and name not in VARIABLES:
            raise ValueError(f"{name} is no variable of flash-comm: choose {' or '.join(VARIABLES)}, or use the flags.")
    if os.environ.get("FLASH_COMM_FEEDBACK") and not os.environ.get("FLASH_COMM_BITS"):
        raise ValueError("FLASH_COMM_FEEDBACK does nothing without FLASH_COMM_BITS: use --flash-comm-feedback.")
    switch = os.environ.get("FLASH_COMM_DISABLE", "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"FLASH_COMM_DISABLE={switch}: choose 1 to keep Megatron untouched, 0 to let flags decide.")


def is_disabled() -> bool:
    """Whether the kill switch is set."""
    return os.environ.get("FLASH_COMM_DISABLE", "0") not in ("", "0")


def from_environment() -> dict[str, Any]:
    """Options of a configuration that variables ask for; none without FLASH_COMM_BITS.

    ValueError if that is no number; Config knows which numbers and words are right.
    """
    bits, feedback = (os.environ.get(f"FLASH_COMM_{name}", "") for name in ("BITS", "FEEDBACK"))
    if not bits:
        return {}
    if not bits.isdigit():
        raise ValueError(f"FLASH_COMM_BITS={bits} is no number: choose {BITS}.")
    return {"bits": int(bits)} | ({"feedback": feedback} if feedback else {})
