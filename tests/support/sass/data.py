"""Loads, stores, atomics, special registers, constants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import Array
from .operands import Address, Operand
from .state import AT_CLOCK, WARP

if TYPE_CHECKING:
    from .machine import Decoded, Machine

SIZES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}


def size_of(i: Decoded) -> int:
    """Bytes that a lane moves."""
    return next((SIZES[name] for name in i.modifiers if name in SIZES), 4)


def _put_loaded(m: Machine, i: Decoded, where: Operand, words: Array, lanes: Array) -> None:
    signed = {"S8": np.int8, "S16": np.int16}
    for name in i.modifiers:
        if name in signed:
            words = words.astype(signed[name]).astype(np.int32).view(np.uint32)
    for word in range(words.shape[1]):
        full = np.zeros(m.lanes, np.uint32)
        full[lanes] = words[:, word]
        m.put(where, full, lanes, word)


def _values(m: Machine, operand: Operand, size: int, lanes: Array) -> Array:
    return np.stack([operand.raw(m, word)[lanes] for word in range(max(size // 4, 1))], 1)


def ldg(m: Machine, i: Decoded, lanes: Array) -> None:
    if lanes.any() and i.address:
        words = m.memory.load(i.address.of(m, wide=True)[lanes], size_of(i))
        _put_loaded(m, i, next(o for o in i.at if not o.predicate), words, lanes)


def stg(m: Machine, i: Decoded, lanes: Array) -> None:
    if lanes.any() and i.address:
        size = size_of(i)
        m.memory.store(i.address.of(m, wide=True)[lanes], size, _values(m, i.at[0], size, lanes))


def lds(m: Machine, i: Decoded, lanes: Array) -> None:
    if lanes.any() and i.address:
        where = i.address.of(m, wide=False)[lanes], m.block[lanes], m.warp[lanes]
        _put_loaded(m, i, i.at[0], m.shared.load(*where, size_of(i)), lanes)


def sts(m: Machine, i: Decoded, lanes: Array) -> None:
    if lanes.any() and i.address:
        size = size_of(i)
        where = i.address.of(m, wide=False)[lanes], m.block[lanes], m.warp[lanes]
        m.shared.store(*where, size, _values(m, i.at[0], size, lanes))


def _places(m: Machine, i: Decoded, lanes: Array) -> tuple[Array, Array]:
    """Indices into the lanes' stacks, [lanes, bytes]; a stack grows down from an address that does not matter."""
    assert i.address
    offsets = i.address.of(m, wide=False)[lanes].astype(np.int64)[:, None] + np.arange(max(size_of(i), 4))
    return np.flatnonzero(lanes)[:, None], offsets % m.stacks.shape[1]


def ldl(m: Machine, i: Decoded, lanes: Array) -> None:
    if lanes.any():
        found = m.stacks[_places(m, i, lanes)]
        found[:, size_of(i) :] = 0
        _put_loaded(m, i, i.at[0], np.ascontiguousarray(found).view(np.uint32), lanes)


def stl(m: Machine, i: Decoded, lanes: Array) -> None:
    if lanes.any():
        where, at = _places(m, i, lanes)
        size = size_of(i)
        values = np.ascontiguousarray(_values(m, i.at[0], size, lanes)).view(np.uint8)
        m.stacks[where, at[:, :size]] = values[:, :size]


def atomic(m: Machine, i: Decoded, lanes: Array) -> None:
    """``ATOMG.E.ADD PT, R1, [..], R2``, ``ATOMG.E.CAS.64 PT, R1, [..], R2, R4``, ``RED``: one lane after the other."""
    size, numbers = size_of(i), [operand for operand in i.at if not operand.predicate]
    result, sources = (None, numbers) if i.source.op == "RED" else (numbers[0], numbers[1:])
    assert i.address
    addresses = i.address.of(m, wide=True)
    for lane in np.flatnonzero(lanes):
        alone = np.arange(m.lanes) == lane
        before = m.memory.load(addresses[alone], size)
        given = [_values(m, operand, size, alone) for operand in sources]
        if "CAS" in i.modifiers:
            after = given[1] if (before == given[0]).all() else before
        elif "ADD" in i.modifiers:
            kind = np.uint64 if size == 8 else np.uint32
            after = (before.view(kind) + given[0].view(kind)).view(np.uint32)
        elif "EXCH" in i.modifiers:
            after = given[0]
        else:
            raise NotImplementedError(i.source.text)
        m.memory.store(addresses[alone], size, after)
        if result:
            _put_loaded(m, i, result, before, alone)


def special(m: Machine, i: Decoded, lanes: Array) -> None:
    """``S2R R0, SR_TID.X``, ``CS2R R2, SRZ``; a look at the clock gives way to others."""
    name = i.source.operands[1]
    if "GLOBALTIMER" in name or "CLOCK" in name:
        m.put_wide(i.at[0], np.full(m.lanes, m.clock, np.uint64), lanes)
        return give_way(m, i, lanes)
    within = np.arange(m.lanes) % m.threads
    known = {"SR_TID.X": within, "SR_CTAID.X": m.block, "SR_LANEID": within % WARP}
    zero = np.zeros(m.lanes, np.uint32)
    m.put(i.at[0], known.get(name, zero) if name in known else _known_zero(name, zero), lanes)
    if i.source.op == "CS2R" and "32" not in i.modifiers:
        m.put(i.at[0], zero, lanes, 1)


def _known_zero(name: str, zero: Array) -> Array:
    if name not in ("SRZ", "SR_CgaCtaId", "SR_TID.Y", "SR_TID.Z"):
        raise NotImplementedError(name)
    return zero


def give_way(m: Machine, i: Decoded, lanes: Array) -> None:
    """``NANOSLEEP``, and a look at the clock: whoever has work goes first."""
    m.state[lanes] = AT_CLOCK


def to_uniform(m: Machine, i: Decoded, lanes: Array) -> None:
    """``R2UR UR4, R5``: what the first of the lanes has."""
    rows = lanes.reshape(-1, WARP)
    first = np.arange(len(rows)) * WARP + rows.argmax(1)
    m.put(i.at[0], np.repeat(i.at[-1].integer(m)[first], WARP), lanes)


def constant(m: Machine, i: Decoded, lanes: Array) -> None:
    """``LDC R1, c[0x0][R2+0x160]``, ``ULDC.64 UR4, c[0x0][0x118]``"""
    place = i.source.operands[1]
    offsets = Address(place[place.index("][") + 1 :]).of(m, wide=False).astype(np.int64)
    _put_loaded(m, i, i.at[0], m.constants(offsets, size_of(i))[lanes], lanes)


STEPS = {
    "LDG": ldg, "LD": ldg, "STG": stg, "ST": stg, "LDS": lds, "STS": sts, "LDL": ldl, "STL": stl,
    "ATOM": atomic, "ATOMG": atomic,
    "RED": atomic, "S2R": special, "S2UR": special, "CS2R": special, "NANOSLEEP": give_way, "LDC": constant,
    "ULDC": constant, "R2UR": to_uniform,
}  # fmt: skip
