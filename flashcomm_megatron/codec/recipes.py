"""The recipes: every published method, and ours, as one row that composes codecs and an algorithm.

A recipe is data. The collectives know two *legs*, the reduce leg (partial sums on their way to whoever adds them)
and the gather leg (finished values on their way to everybody), and are given a codec for each; nothing in them
asks which recipe is running. Adding a method is adding a row here and, if its number format is new, a codec file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import Codec, Microscaling, Rotated, Spike, Uncalibrated, Uniform
from .planes import WIDTHS


class Legs(NamedTuple):
    """The codecs of one recipe at one width."""

    reduce: Codec
    gather: Codec


class Recipe(NamedTuple):
    """One row of the table."""

    widths: tuple[int, ...]  # bits it is defined for
    block: int  # values sharing a scale, unless the user asks for another block
    algorithm: str  # "auto", "one-step" or "two-step" when the user leaves it open
    legs: Callable[[int, int], Legs]  # (bits, block) -> codecs
    source: str
    calibrated: bool = False  # the reduce leg has a codec of its own at every site, from a calibration file
    feedback: bool = False  # what a rounding lost is added to the rank's next contribution (feedback.py)


def _same(bits: int, block: int) -> Legs:
    return Legs(Uniform(bits, block), Uniform(bits, block))


def _auto(bits: int, block: int) -> Legs:
    """Reduce leg: ``bits`` + 0.5 a value. Gather leg: ``bits`` + 1, in blocks twice as long. At most 8.

    These are the widest codes that cost at most one bit a value more than ``bits``, metadata included
    (docs/accuracy.md). Rotated counts levels in half bits, so 4 bits are ``Rotated(4.5)`` and ``Rotated(5)``.
    """
    return Legs(Rotated(min(bits + 0.5, 8), block), Rotated(min(bits + 1, 8), min(2 * block, 1024)))


def _flash_v1(bits: int, block: int) -> Legs:
    """Flash Communication's "INT6" is 4 bits on the reduce leg and 8 on the gather leg."""
    return Legs(Uniform(4, block), Uniform(8, block)) if bits == 6 else _same(bits, block)


def _flash_v2(bits: int, block: int) -> Legs:
    return Legs(Spike(bits, block), Spike(bits, block))


def _microscaling(elements: dict[int, str], kind: str) -> Recipe:
    """A row of its own for each kind of element, so that ``bits`` names the element and no other option is needed."""

    def legs(bits: int, block: int) -> Legs:
        return Legs(Microscaling(elements[bits], block), Microscaling(elements[bits], block))

    source = f"Hansen-Palmus et al., arXiv 2411.09510, on OCP MX v1.0: {kind}"
    return Recipe(tuple(elements), 32, "one-step", legs, source)


def _outlier(bits: int, block: int) -> Legs:
    """The paper gathers partial sums and knows no second leg; finished values, where gathered, take 8-bit integers."""
    return Legs(Uncalibrated(), Uniform(8, block))


RECIPES: dict[str, Recipe] = {
    "auto": Recipe(tuple(WIDTHS), 32, "auto", _auto, "ours: rotated blocks, residual feedback", feedback=True),
    "flash-v1": Recipe((4, 6, 8), 128, "two-step", _flash_v1, "Flash Communication, arXiv 2412.04964"),
    "flash-v2": Recipe(tuple(WIDTHS), 64, "two-step", _flash_v2, "FlashCommunication V2, arXiv 2508.03760"),
    "mx": _microscaling({4: "e2m1", 5: "e2m2", 6: "e2m3", 8: "e4m3"}, "floats with most mantissa"),
    "mx-wide": _microscaling({5: "e3m1", 6: "e3m2", 8: "e5m2"}, "floats with most exponent"),
    "mx-int": _microscaling({3: "int3", 4: "int4", 5: "int5", 6: "int6", 8: "int8"}, "integers"),
    "outlier": Recipe((4,), 128, "one-step", _outlier, "Dong et al., arXiv 2411.07942", calibrated=True),
}
