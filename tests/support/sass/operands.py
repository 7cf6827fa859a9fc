"""Operands of an instruction, parsed once: what they read of the machine, one number for every lane."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .memory import Array

if TYPE_CHECKING:
    from .machine import Machine

REGISTER = re.compile(r"(U?)R(\d+|Z)$")
PREDICATE = re.compile(r"!?(U?)P(\d|T)$")
CONSTANT = re.compile(r"c\[(0x\w+)\]\[(.*)\]$")
WORDS = {"+INF": 0x7F800000, "-INF": 0xFF800000, "+QNAN": 0x7FC00000, "-QNAN": 0xFFC00000}
ZERO_REGISTER, TRUE_PREDICATE = 255, 7


def number(text: str) -> int | None:
    """The 32 bits of an immediate: ``0x3f``, ``-0x1``, ``1.5``, ``+INF``; None: it is something else."""
    if text in WORDS:
        return WORDS[text]
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return int(text, 16) & 0xFFFFFFFF
    if re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", text):
        return int(np.float32(float(text)).view(np.uint32))
    return None


class Operand:
    """``-R5``, ``|R5|``, ``~UR4``, ``!P0``, ``c[0x0][0x210]``, ``R7.H1_H1``, an immediate."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.half = next((int(h[1]) for h in ("H0", "H1") if f".{h}_{h}" in text), None)
        self.immediate = number(text)
        body = re.sub(r"\.(64|H\d_H\d)", "", text)
        self.negate = self.immediate is None and body[:1] == "-"
        self.invert = body[:1] in "~!"
        body = body.lstrip("-~!")
        self.absolute = body[:1] == "|"
        body = body.strip("|")
        self.predicate = PREDICATE.match(text) is not None
        self.uniform, self.index = False, ZERO_REGISTER
        if found := REGISTER.match("RZ" if body == "SRZ" else body) or PREDICATE.match(body):
            self.uniform = found[1] == "U"
            self.index = int(found[2]) if found[2] not in "ZT" else TRUE_PREDICATE if self.predicate else ZERO_REGISTER
        self.constant = CONSTANT.match(body)

    @property
    def is_zero(self) -> bool:
        """Whether it is RZ, URZ or PT: what is written there is gone."""
        is_last = self.index == (TRUE_PREDICATE if self.predicate else ZERO_REGISTER)
        return is_last and self.immediate is None and self.constant is None

    def raw(self, m: Machine, word: int = 0) -> Array:
        """The bits of this register, or of the one ``word`` further on."""
        if self.immediate is not None:
            return m.number(self.immediate if word == 0 else 0)
        if self.constant:
            return m.constant(self.constant[2], word)
        if self.index == ZERO_REGISTER:
            return m.number(0)
        return (m.uniform if self.uniform else m.registers)[self.index + word]

    def integer(self, m: Machine) -> Array:
        """uint32, negated or inverted as the sign says."""
        value = self.raw(m)
        if self.absolute:
            value = np.abs(value.view(np.int32)).view(np.uint32)
        return ~value if self.invert else (~value + np.uint32(1)) if self.negate else value

    def signed(self, m: Machine) -> Array:
        """int32"""
        return self.integer(m).view(np.int32)

    def addend(self, m: Machine, carries: bool) -> Array:
        """uint64 for an adder of 32 bits: -x is ~x + 1, and the 1 may carry; ~x alone where it ``carries``."""
        if self.negate and not carries:
            return (~self.raw(m)).astype(np.uint64) + np.uint64(1)
        return (~self.raw(m) if self.negate or self.invert else self.raw(m)).astype(np.uint64)

    def wide(self, m: Machine) -> Array:
        """uint64 of two registers."""
        value = self.raw(m).astype(np.uint64) | self.raw(m, 1).astype(np.uint64) << np.uint64(32)
        return ~value + np.uint64(1) if self.negate else value

    def floating(self, m: Machine) -> Array:
        """float32"""
        value = self.raw(m).view(np.float32)
        if self.half is not None:
            value = (self.raw(m) >> np.uint32(16 * self.half)).astype(np.uint16).view(np.float16).astype(np.float32)
        value = np.abs(value) if self.absolute else value
        return -value if self.negate else value

    def truth(self, m: Machine) -> Array:
        """Of a predicate, in every lane."""
        value = (m.uniform_predicates if self.uniform else m.predicates)[self.index]
        return ~value if self.invert else value


class Address:
    """``desc[UR4][R2.64+UR6+0x10]``, ``[R3.X16+0x400]``: a sum, in 64 bits where a register pair is in it."""

    def __init__(self, text: str) -> None:
        inner = re.sub(r"^desc\[UR\d+\]", "", text).strip("[]").replace("+-", "-").replace("-0x", "+-0x")
        self.terms: list[tuple[Operand, str]] = []
        self.offset = 0
        for term in filter(None, inner.split("+")):
            name, _, suffix = term.partition(".")
            if REGISTER.match(name):
                self.terms.append((Operand(name), suffix))
            else:
                self.offset += int(term, 16)

    def of(self, m: Machine, wide: bool) -> Array:
        """uint64; ``wide``: a register without a suffix is a pair too, as generic addresses are."""
        total = np.full(m.lanes, self.offset, np.int64).view(np.uint64)
        for operand, suffix in self.terms:
            if suffix == "64" or (wide and suffix == ""):
                total = total + operand.wide(m)
            elif suffix.startswith("X"):
                total = total + operand.raw(m).astype(np.uint64) * np.uint64(int(suffix[1:]))
            else:
                total = total + operand.raw(m).view(np.int32).astype(np.int64).view(np.uint64)
        return total
