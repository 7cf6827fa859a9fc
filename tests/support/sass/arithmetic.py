"""Integers, logic, predicates. A uniform instruction (UIADD3) is the ordinary one with other registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import Array
from .operands import Operand

if TYPE_CHECKING:
    from .machine import Decoded, Machine

HALF = np.uint64(32)
LOW = np.uint64(0xFFFFFFFF)
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "GE": np.greater_equal, "GT": np.greater, "LE": np.less_equal, "LT": np.less, "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip


def _split(i: Decoded) -> tuple[Operand, list[Operand], list[Operand], list[Operand]]:
    """(result, predicates that take a carry out, sources, predicates that bring one in); found once."""
    if i.memo is None:
        after = i.at[1:]
        start = next(k for k, operand in enumerate(after) if not operand.predicate)
        end = next((k for k, operand in enumerate(after) if k > start and operand.predicate), len(after))
        i.memo = i.at[0], after[:start], after[start:end], after[end:]
    return i.memo  # type: ignore[no-any-return]


def mov(m: Machine, i: Decoded, lanes: Array) -> None:
    m.put(i.at[0], i.at[1].integer(m), lanes)


def add(m: Machine, i: Decoded, lanes: Array) -> None:
    """``IADD3 R1, P0, P1, R2, -R3, R4``; ``IADD3.X R1, R2, ~R3, R4, P0, P1``"""
    result, out, sources, carries = _split(i)
    if not out and not carries:
        total = sources[0].integer(m)
        for source in sources[1:]:
            total = total + source.integer(m)
        return m.put(result, total, lanes)
    extended = "X" in i.modifiers
    wide = sum((source.addend(m, extended) for source in sources), start=np.zeros(m.lanes, np.uint64))
    for carry in carries if extended else []:
        wide = wide + carry.truth(m)
    m.put(result, wide & LOW, lanes)
    for number, predicate in enumerate(out):
        m.put_truth(predicate, wide >> HALF > number, lanes)


def multiply_add(m: Machine, i: Decoded, lanes: Array) -> None:
    """IMAD and its forms: WIDE, HI, X; MOV, SHL, IADD and U32 are names for constants among the operands."""
    result, out, (a, b, c), carries = _split(i)
    if not {"WIDE", "HI", "X"} & set(i.modifiers):
        return m.put(result, a.integer(m) * b.integer(m) + c.integer(m), lanes)
    if "U32" in i.modifiers or "X" in i.modifiers:
        product = a.integer(m).astype(np.uint64) * b.integer(m)
    else:
        product = (a.signed(m).astype(np.int64) * b.signed(m)).view(np.uint64)
    if "X" in i.modifiers and "WIDE" not in i.modifiers and "HI" not in i.modifiers:
        total = (product & LOW) + c.addend(m, True) + carries[0].truth(m)
        return m.put(result, total & LOW, lanes)
    total = product if c.is_zero else product + c.wide(m)
    if "X" in i.modifiers:
        total = total + carries[0].truth(m)
    for predicate in out:
        m.put_truth(predicate, total < product, lanes)
    if "HI" in i.modifiers:
        return m.put(result, total >> HALF, lanes)
    m.put_wide(result, total, lanes)


def shift_add(m: Machine, i: Decoded, lanes: Array) -> None:
    """``LEA R1, P0, R2, R3, 0x2``: R3 + (R2 << 2); HI: of the upper half, whose own upper half is another register."""
    result, out, sources, carries = _split(i)
    extended = "X" in i.modifiers
    a, b, shift = sources[0].integer(m).astype(np.uint64), sources[1], sources[-1].immediate
    assert shift is not None
    if "HI" in i.modifiers:
        whole = sources[0].signed(m).astype(np.int64).view(np.uint64)
        if "SX32" not in i.modifiers:
            whole = a | sources[2].integer(m).astype(np.uint64) << HALF
        a = (whole << np.uint64(shift)) >> HALF
    else:
        a = (a << np.uint64(shift)) & LOW
        if sources[0].negate:  # carries where it borrows nothing, of zero too
            a = np.where(a == 0, np.uint64(1) << HALF, a)
    total = a + b.addend(m, extended)
    if extended:
        total = total + carries[0].truth(m)
    m.put(result, total & LOW, lanes)
    for predicate in out:
        m.put_truth(predicate, total >> HALF != 0, lanes)


def shift(m: Machine, i: Decoded, lanes: Array) -> None:
    """``SHF.R.U32.HI R1, R2, R3, R4``: R4:R2 shifted by R3, of which the lower or (HI) the upper half is kept."""
    mods, (a, by, c) = i.modifiers, i.at[1:4]
    width = 64 if "U64" in mods or "S64" in mods else 32
    amount = by.integer(m)
    amount = amount & np.uint32(width - 1) if "W" in mods else np.minimum(amount, np.uint32(width))
    whole = a.integer(m).astype(np.uint64) | c.integer(m).astype(np.uint64) << HALF
    least = np.minimum(amount, np.uint32(63)).astype(np.uint64)
    gone = amount > 63
    if "L" in mods:
        moved = np.where(gone, np.uint64(0), whole << least)
    elif "S32" in mods or "S64" in mods:
        moved = (whole.view(np.int64) >> least.view(np.int64)).view(np.uint64)
    else:
        moved = np.where(gone, np.uint64(0), whole >> least)
    m.put(i.at[0], moved >> HALF if "HI" in mods else moved & LOW, lanes)


# ---- logic -------------------------------------------------------------------------------------------------------


@lru_cache
def lookup(table: int) -> Callable[[Any, Any, Any], Any]:
    """The function of three bits that a table of eight tells, as an expression of its own."""

    def expression(bits: int, names: str) -> str:
        count = 1 << len(names)
        ones = (1 << count) - 1
        if bits in (0, ones):
            return "zero" if bits == 0 else "~zero"
        low, high = bits & ((1 << count // 2) - 1), bits >> count // 2
        first, rest = names[0], names[1:]
        if low == high:
            return expression(low, rest)
        if low == high ^ (1 << count // 2) - 1:
            return f"({first} ^ {expression(low, rest)})"
        parts = [f"({sign}{first} & {expression(half, rest)})" for sign, half in (("", high), ("~", low)) if half]
        return f"({' | '.join(parts)})"

    text = expression(table, "abc")
    return eval(f"lambda a, b, c: (lambda zero: {text})(a ^ a)")  # type: ignore[no-any-return]


def logic(m: Machine, i: Decoded, lanes: Array) -> None:
    """``LOP3.LUT P0, R1, R2, R3, R4, 0xc0, !PT``: the predicate: any bit, or (PAND: and) the last operand"""
    if i.memo is None:
        at = i.at[1:] if i.at[0].predicate else i.at
        i.memo = i.at[0] if i.at[0].predicate else None, at[0], at[1:4], lookup(at[4].immediate or 0)
    predicate, result, sources, function = i.memo
    value = function(*(source.integer(m) for source in sources))
    m.put(result, value, lanes)
    if predicate:
        combine = np.logical_and if "PAND" in i.modifiers else np.logical_or
        m.put_truth(predicate, combine(value != 0, i.at[-1].truth(m)), lanes)


def predicate_logic(m: Machine, i: Decoded, lanes: Array) -> None:
    """``PLOP3.LUT P0, P1, P2, P3, P4, 0x80, 0x08``: two results of the same three"""
    sources = [operand.truth(m) for operand in i.at[2:5]]
    values = [lookup(table.immediate or 0)(*sources) for table in i.at[5:7]]
    for result, value in zip(i.at, values, strict=False):
        m.put_truth(result, value, lanes)


def permute(m: Machine, i: Decoded, lanes: Array) -> None:
    """``PRMT R1, R2, 0x5410, R3``: bytes of R3:R2 by their numbers; 8 more: the sign of that byte."""
    a, selector, c = (operand.integer(m) for operand in i.at[1:4])
    whole = a.astype(np.uint64) | c.astype(np.uint64) << HALF
    result = np.zeros(m.lanes, np.uint32)
    constant = i.at[2].immediate
    for k in range(4):
        pick = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = ((whole >> (np.uint64(8) * (pick & np.uint32(7)))) & np.uint64(255)).astype(np.uint32)
        if constant is None or constant >> 4 * k & 8:
            byte = np.where(pick & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
        result |= byte << np.uint32(8 * k)
    m.put(i.at[0], result, lanes)


def select(m: Machine, i: Decoded, lanes: Array) -> None:
    m.put(i.at[0], np.where(i.at[3].truth(m), i.at[1].integer(m), i.at[2].integer(m)), lanes)


# ---- comparisons -------------------------------------------------------------------------------------------------


def put_comparison(m: Machine, i: Decoded, found: Array, lanes: Array) -> None:
    """``P0, P1 = found and P2, not found and P2`` and the like."""
    other = i.at[4].truth(m)
    combine = np.logical_or if "OR" in i.modifiers else np.logical_xor if "XOR" in i.modifiers else np.logical_and
    first, second = combine(found, other), combine(~found, other)
    m.put_truth(i.at[0], first, lanes)
    m.put_truth(i.at[1], second, lanes)


def compare(m: Machine, i: Decoded, lanes: Array) -> None:
    """``ISETP.GE.U32.AND P0, PT, R1, R2, PT``; EX: the upper halves, with what the lower ones gave."""
    name = i.modifiers[0]
    a, b = i.at[2].integer(m), i.at[3].integer(m)
    if "U32" not in i.modifiers:
        a, b = a.view(np.int32), b.view(np.int32)
    found = COMPARE[name](a, b)
    if "EX" in i.modifiers:
        lower = i.at[5].truth(m)
        if name in ("EQ", "NE"):
            found = found & lower if name == "EQ" else found | lower
        else:
            found = COMPARE[name[0] + "T"](a, b) | ((a == b) & lower)
    put_comparison(m, i, found, lanes)


def _extreme(m: Machine, i: Decoded, sources: list[Array]) -> Array:
    """The least of them where the last operand says so, else the greatest; RELU: not below zero."""
    least = i.at[-1].truth(m)
    if "U16x2" in i.modifiers or "S16x2" in i.modifiers:
        kind: Any = np.uint16 if "U16x2" in i.modifiers else np.int16
        least = np.repeat(least, 2)
    else:
        kind = np.uint32 if "U32" in i.modifiers else np.int32
    result = sources[0].view(kind)
    for source in sources[1:]:
        other = source.view(kind)
        result = np.where(least, np.minimum(result, other), np.maximum(result, other))
    if "RELU" in i.modifiers:
        result = np.maximum(result, kind(0))
    return result.view(np.uint32)


def minmax(m: Machine, i: Decoded, lanes: Array) -> None:
    """``VIMNMX R1, R2, R3, PT``, with a third for VIMNMX3"""
    m.put(i.at[0], _extreme(m, i, [np.ascontiguousarray(o.integer(m)) for o in i.at[1:-1] if not o.predicate]), lanes)


def add_minmax(m: Machine, i: Decoded, lanes: Array) -> None:
    """``VIADDMNMX R1, R2, R3, R4, PT``: of R2 + R3 and R4"""
    a, b, c = (operand.integer(m) for operand in i.at[1:4])
    m.put(i.at[0], _extreme(m, i, [a + b, c]), lanes)


def absolute(m: Machine, i: Decoded, lanes: Array) -> None:
    m.put(i.at[0], np.abs(i.at[1].signed(m)).view(np.uint32), lanes)


def from_predicates(m: Machine, i: Decoded, lanes: Array) -> None:
    """``P2R R0, PR, R1, 0x7f``: the predicates of a mask as bits"""
    mask = i.at[-1].immediate or 0
    value = i.at[2].integer(m) & np.uint32(~mask & 0xFFFFFFFF)
    for k in range(7):
        if mask >> k & 1:
            value = value | m.predicates[k].astype(np.uint32) << np.uint32(k)
    m.put(i.at[0], value, lanes)


def to_predicates(m: Machine, i: Decoded, lanes: Array) -> None:
    """``R2P PR, R0, 0x7f``"""
    value, mask = i.at[1].integer(m), i.at[-1].immediate or 0
    for k in range(7):
        if mask >> k & 1:
            np.copyto(m.predicates[k], (value >> np.uint32(k) & np.uint32(1)).astype(bool), where=lanes)


def find_leading(m: Machine, i: Decoded, lanes: Array) -> None:
    """``FLO.U32 R1, R2``: the number of the highest bit that is set; ``SH``: by how much to shift it to the top"""
    value = i.at[1].integer(m)
    top = np.frexp(value.astype(np.float64))[1].astype(np.int64) - 1
    m.put(i.at[0], np.where(value == 0, 0xFFFFFFFF, 31 - top if "SH" in i.modifiers else top), lanes)


def count_bits(m: Machine, i: Decoded, lanes: Array) -> None:
    value = np.ascontiguousarray(i.at[1].integer(m))
    m.put(i.at[0], np.unpackbits(value.view(np.uint8)).reshape(-1, 32).sum(1, dtype=np.uint32), lanes)


STEPS = {
    "MOV": mov, "IADD3": add, "VIADD": add, "IMAD": multiply_add, "LEA": shift_add, "SHF": shift, "LOP3": logic,
    "PLOP3": predicate_logic, "PRMT": permute, "SEL": select, "ISETP": compare, "IMNMX": minmax, "VIMNMX": minmax,
    "VIMNMX3": minmax, "VIADDMNMX": add_minmax, "IABS": absolute, "P2R": from_predicates, "R2P": to_predicates,
    "FLO": find_leading, "POPC": count_bits,
}  # fmt: skip
