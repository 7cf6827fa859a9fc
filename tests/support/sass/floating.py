"""float32 as IEEE has it, halves, and conversions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import COMPARE, put_comparison
from .memory import Array

if TYPE_CHECKING:
    from .machine import Decoded, Machine

F32 = np.float32
TINY = F32(2.0**-126)
HALF_NAN = np.uint32(0x7FFF)  # what minima and conversions of the hardware give


def _flushed(i: Decoded, x: Array) -> Array:
    """FTZ: denormal numbers are zeros."""
    return np.where(np.abs(x) < TINY, np.copysign(F32(0), x), x) if "FTZ" in i.modifiers else x


def rounded(x: Array, i: Decoded) -> Array:
    """float64 to float32, in the direction the instruction names: RP, RM, RZ; else to nearest."""
    near = x.astype(F32)
    up, down = near.astype(np.float64) < x, near.astype(np.float64) > x
    infinity = F32(np.inf)
    if "RP" in i.modifiers:
        near = np.where(up, np.nextafter(near, infinity), near)
    elif "RM" in i.modifiers:
        near = np.where(down, np.nextafter(near, -infinity), near)
    elif "RZ" in i.modifiers:
        near = np.where((up & (x < 0)) | (down & (x > 0)), np.nextafter(near, F32(0)), near)
    return near


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c as a float64 that rounds to float32 as the exact sum would: where inexact, its last bit is set."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    apart = total - product
    error = (product - (total - apart)) + (addend - apart)
    bits = total.view(np.int64)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits & 1 == 0) & np.isfinite(total) & np.isfinite(error), bits + toward, bits)
    return odd.view(np.float64)


def _put(m: Machine, i: Decoded, value: Array, lanes: Array) -> None:
    m.put(i.at[0], _flushed(i, value).astype(F32, copy=False).view(np.uint32), lanes)


def add(m: Machine, i: Decoded, lanes: Array) -> None:
    a, b = (_flushed(i, operand.floating(m)) for operand in i.at[1:3])
    directed = {"RP", "RM", "RZ"} & set(i.modifiers)
    _put(m, i, rounded(fused(a, np.ones_like(a), b), i) if directed else a + b, lanes)


def multiply(m: Machine, i: Decoded, lanes: Array) -> None:
    a, b = (_flushed(i, operand.floating(m)) for operand in i.at[1:3])
    directed = {"RP", "RM", "RZ"} & set(i.modifiers)
    _put(m, i, rounded(a.astype(np.float64) * b, i) if directed else a * b, lanes)


def multiply_add(m: Machine, i: Decoded, lanes: Array) -> None:
    """FFMA; HADD2.F32 of one half"""
    a, b, c = (_flushed(i, operand.floating(m)) for operand in i.at[1:4])
    _put(m, i, rounded(fused(a, b, c), i), lanes)


def widen(m: Machine, i: Decoded, lanes: Array) -> None:
    """``HADD2.F32 R1, -RZ, R2.H1_H1``: a half as float32"""
    _put(m, i, i.at[1].floating(m) + i.at[2].floating(m), lanes)


def minmax(m: Machine, i: Decoded, lanes: Array) -> None:
    """FMNMX: a number rather than NaN, but with .NAN; -0 below +0"""
    a, b = i.at[1].floating(m), i.at[2].floating(m)
    least, greatest = (np.minimum, np.maximum) if "NAN" in i.modifiers else (np.fmin, np.fmax)
    low, high = least(a, b), greatest(a, b)
    zeros = (a == 0) & (b == 0)
    low = np.where(zeros, np.where(np.signbit(a) | np.signbit(b), F32(-0.0), F32(0)), low)
    high = np.where(zeros, np.where(np.signbit(a) & np.signbit(b), F32(-0.0), F32(0)), high)
    _put(m, i, np.where(i.at[3].truth(m), low, high), lanes)


def select(m: Machine, i: Decoded, lanes: Array) -> None:
    value = np.where(i.at[3].truth(m), i.at[1].floating(m).view(np.uint32), i.at[2].floating(m).view(np.uint32))
    m.put(i.at[0], value, lanes)


def compare(m: Machine, i: Decoded, lanes: Array) -> None:
    """``FSETP.GEU.AND``: U also where one is NaN; NAN, NUM: whether one is"""
    name = i.modifiers[0]
    a, b = (_flushed(i, operand.floating(m)) for operand in i.at[2:4])
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("NAN", "NUM"):
        found = unordered if name == "NAN" else ~unordered
    elif len(name) == 3:
        found = COMPARE[name[:2]](a, b) | unordered
    else:
        found = COMPARE[name](a, b) & ~unordered
    put_comparison(m, i, found, lanes)


def check_division(m: Machine, i: Decoded, lanes: Array) -> None:
    """FCHK: whether a quotient's steps could leave the range of float32"""
    a, b = (i.at[k].floating(m).view(np.uint32) >> np.uint32(23) & np.uint32(255) for k in (1, 2))
    apart = a.astype(np.int64) - b.astype(np.int64)
    slow = (b < 1) | (b > 252) | (a > 254) | (apart >= 126) | (apart < -120) | ((a > 0) & (a < 26))
    m.put_truth(i.at[0], slow & (i.at[1].floating(m) != 0), lanes)


def approximate(m: Machine, i: Decoded, lanes: Array) -> None:
    """MUFU: denormal numbers are zeros"""
    x = i.at[1].floating(m)
    x = np.where(np.abs(x) < TINY, np.copysign(F32(0), x), x)
    functions = {"RCP": lambda: F32(1) / x, "RSQ": lambda: F32(1) / np.sqrt(x), "SQRT": lambda: np.sqrt(x)}
    value = functions[i.modifiers[0]]()
    _put(m, i, np.where(np.abs(value) < TINY, np.copysign(F32(0), value), value), lanes)


def floor(m: Machine, i: Decoded, lanes: Array) -> None:
    kind = {"FLOOR": np.floor, "CEIL": np.ceil, "TRUNC": np.trunc}
    _put(m, i, next((kind[name] for name in i.modifiers if name in kind), np.rint)(i.at[1].floating(m)), lanes)


# ---- conversions -------------------------------------------------------------------------------------------------


def from_integer(m: Machine, i: Decoded, lanes: Array) -> None:
    """``I2F.U64.RP R1, R2``"""
    kinds = {"U8": np.uint8, "S8": np.int8, "U16": np.uint16, "S16": np.int16, "U32": np.uint32}
    kind = next((kinds[name] for name in i.modifiers if name in kinds), np.int32)
    if "U64" in i.modifiers:
        value = i.at[1].raw(m).astype(np.float64) + i.at[1].raw(m, 1) * 2.0**32
    else:
        value = i.at[1].integer(m).astype(kind).astype(np.float64)
    _put(m, i, rounded(value, i), lanes)


def to_integer(m: Machine, i: Decoded, lanes: Array) -> None:
    """``F2I.U32.TRUNC R1, R2``: limited to the range, NaN is 0"""
    x = _flushed(i, i.at[1].floating(m)).astype(np.float64)
    whole = np.nan_to_num(
        np.trunc(x) if "TRUNC" in i.modifiers else np.floor(x) if "FLOOR" in i.modifiers else np.rint(x)
    )
    if "U64" in i.modifiers:
        m.put_wide(i.at[0], np.clip(whole, 0, 2.0**63).astype(np.uint64), lanes)
    elif "U32" in i.modifiers:
        m.put(i.at[0], np.clip(whole, 0, 2.0**32 - 1).astype(np.uint64), lanes)
    else:
        m.put(i.at[0], np.clip(whole, -(2.0**31), 2.0**31 - 1).astype(np.int64).astype(np.int32).view(np.uint32), lanes)


def pack(m: Machine, i: Decoded, lanes: Array) -> None:
    """``F2FP.BF16.PACK_AB R1, R2, R3``: two float32 as bfloat16 or float16, R2 above"""
    halves = []
    for operand in i.at[1:3]:
        x = operand.floating(m)
        if "BF16" in i.modifiers:
            bits = x.view(np.uint32)
            half = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        else:
            half = x.astype(np.float16).view(np.uint16).astype(np.uint32)
        halves.append(np.where(np.isnan(x), HALF_NAN, half))
    m.put(i.at[0], halves[0] << np.uint32(16) | halves[1], lanes)


def _pairs(m: Machine, i: Decoded) -> list[Array]:
    """The sources but for the last operand: a register holds two halves, an immediate is two, ``+INF , +INF``."""
    found: list[Array] = []
    operands = iter(i.at[1:-1])
    for operand in operands:
        if operand.immediate is None:
            found.append(operand.integer(m))
            continue
        numbers = [each.floating(m) for each in (operand, next(operands))]
        if "BF16_V2" in i.modifiers:
            high, low = (x.view(np.uint32) >> np.uint32(16) for x in numbers)
        else:
            high, low = (x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in numbers)
        found.append(high << np.uint32(16) | low)
    return found


def half_minmax(m: Machine, i: Decoded, lanes: Array) -> None:
    """``HMNMX2.BF16_V2.NAN R1, R2, R3, PT``, with a third for VHMNMX: two halves at a time; NaN if one is"""
    assert "NAN" in i.modifiers, i.source.text
    infinity = np.uint16(0x7F80 if "BF16_V2" in i.modifiers else 0x7C00)
    least = np.repeat(i.at[-1].truth(m), 2)
    sources = [np.ascontiguousarray(x).view(np.uint16) for x in _pairs(m, i)]
    keys = [np.where(x & 0x8000, ~x, x | np.uint16(0x8000)) for x in sources]
    result = keys[0]
    for key in keys[1:]:
        result = np.where(least, np.minimum(result, key), np.maximum(result, key))
    result = np.where(result & 0x8000, result & np.uint16(0x7FFF), ~result)
    nan = np.any([(x & np.uint16(0x7FFF)) > infinity for x in sources], axis=0)
    m.put(i.at[0], np.where(nan, np.uint16(HALF_NAN), result).astype(np.uint16).view(np.uint32), lanes)


def two_halves(m: Machine, i: Decoded, lanes: Array) -> None:
    """``HFMA2.MMA R1, -RZ, RZ, 0, 5.96e-08``: how the compiler loads a constant; no other form of it is known here"""
    if not (i.at[1].is_zero and i.at[2].is_zero):
        raise NotImplementedError(i.source.text)
    high, low = (operand.floating(m).astype(np.float16).view(np.uint16).astype(np.uint32) for operand in i.at[3:5])
    m.put(i.at[0], high << np.uint32(16) | low, lanes)


STEPS = {
    "HFMA2": two_halves,
    "FADD": add, "FMUL": multiply, "FFMA": multiply_add, "HADD2": widen, "FMNMX": minmax, "FSEL": select,
    "FSETP": compare, "FCHK": check_division, "MUFU": approximate, "FRND": floor, "I2F": from_integer,
    "I2FP": from_integer, "F2I": to_integer, "F2FP": pack, "HMNMX2": half_minmax, "VHMNMX": half_minmax,
}  # fmt: skip
