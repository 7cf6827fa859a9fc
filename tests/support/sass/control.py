"""Branches, convergence barriers, block barriers, exchanges and votes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import Array
from .state import AT_BARRIER, AT_SYNC, AT_WARPSYNC, ENDED, WARP, DivergenceError

if TYPE_CHECKING:
    from .machine import Decoded, Machine


def unknown(m: Machine, i: Decoded, lanes: Array) -> None:
    """An instruction this interpreter does not have."""
    raise NotImplementedError(f"{i.source.text} at 0x{i.source.address:x}")


def nothing(m: Machine, i: Decoded, lanes: Array) -> None:
    """Order of memory, hints, padding."""


def branch(m: Machine, i: Decoded, lanes: Array) -> None:
    """``BRA P0, 0x100``; ``BRA.DIV UR4, 0x100``: only where some lane of the warp is elsewhere."""
    *conditions, target = i.source.operands
    if "DIV" in i.modifiers:
        wanted = i.at[0].integer(m) & ~m.masks(m.state == ENDED)
        lanes = lanes & ((wanted & ~m.masks(lanes)) != 0)
    elif conditions:
        lanes = lanes & i.at[0].truth(m)
    m.pc[lanes] = int(target, 16)


def call(m: Machine, i: Decoded, lanes: Array) -> None:
    m.pc[lanes] = int(i.source.operands[-1], 16)


def ret(m: Machine, i: Decoded, lanes: Array) -> None:
    """``RET.REL.NODEC R18 0x0``: to where the register says, in the same function."""
    register = int(i.source.operands[0].split()[0][1:])
    m.pc[lanes] = m.registers[register][lanes]


def leave(m: Machine, i: Decoded, lanes: Array) -> None:
    m.state[lanes] = ENDED
    if lanes.any():
        settle(m)


# ---- lanes of a warp meet ----------------------------------------------------------------------------------------


def bssy(m: Machine, i: Decoded, lanes: Array) -> None:
    """These lanes will meet at a BSYNC."""
    np.copyto(m.barriers[_barrier(i)], m.masks(lanes), where=lanes)


def break_(m: Machine, i: Decoded, lanes: Array) -> None:
    """These lanes will not."""
    m.barriers[_barrier(i)] &= ~m.masks(lanes)
    settle(m)


def bsync(m: Machine, i: Decoded, lanes: Array) -> None:
    needed = m.barriers[_barrier(i)] & ~m.masks(m.state == ENDED)
    missing = lanes & ((needed & ~m.masks(lanes)) != 0)
    if missing.any():
        m.state[missing], m.pc[missing] = AT_SYNC, i.source.address
        settle(m)


def warpsync(m: Machine, i: Decoded, lanes: Array) -> None:
    """Waits for the lanes of a mask, all by default."""
    m.state[lanes], m.pc[lanes] = AT_WARPSYNC, i.source.address
    settle(m)


def bmov(m: Machine, i: Decoded, lanes: Array) -> None:
    """Keeps a convergence barrier in a register, or brings it back."""
    to, value = i.source.operands
    if to.startswith("B"):
        np.copyto(m.barriers[int(to[1:])], i.at[1].integer(m), where=lanes)
    else:
        m.put(i.at[0], m.barriers[int(value[1:])], lanes)


def _barrier(i: Decoded) -> int:
    return int(next(text for text in i.source.operands if text.startswith("B"))[1:])


def settle(m: Machine) -> None:
    """Releases lanes that wait where everybody has come whom they wait for."""
    ended = m.masks(m.state == ENDED)
    for state in (AT_SYNC, AT_WARPSYNC):
        waiting = m.state == state
        for pc in np.unique(m.pc[waiting]):
            here = waiting & (m.pc == pc)
            needed = _needed(m, m.code[int(pc)]) & ~ended
            complete = here & ((needed & ~m.masks(here)) == 0)
            if complete.any():
                m.release(complete)
    _open_barriers(m)


def _needed(m: Machine, i: Decoded) -> Array:
    if i.source.op == "BSYNC":
        return m.barriers[_barrier(i)]
    return m.number(0xFFFFFFFF) if "ALL" in i.modifiers else i.at[0].integer(m)


# ---- threads of a block meet -------------------------------------------------------------------------------------


def bar(m: Machine, i: Decoded, lanes: Array) -> None:
    """``BAR.SYNC``; ``BAR.RED.AND`` with a vote whose outcome B2R fetches."""
    m.state[lanes], m.pc[lanes] = AT_BARRIER, i.source.address
    if "RED" in i.modifiers:
        np.copyto(m.votes, next(o for o in i.at if o.predicate).truth(m), where=lanes)
    _open_barriers(m)


def _open_barriers(m: Machine) -> None:
    waiting = (m.state == AT_BARRIER).reshape(m.blocks, -1)
    ended = (m.state == ENDED).reshape(m.blocks, -1)
    for block in np.flatnonzero((waiting | ended).all(1) & waiting.any(1)):
        lanes = (m.block == block) & (m.state == AT_BARRIER)
        if len(np.unique(m.pc[lanes])) > 1:
            raise DivergenceError("threads of a block wait at different barriers")
        m.votes[lanes] = m.votes[lanes].all()
        m.release(lanes)


def b2r(m: Machine, i: Decoded, lanes: Array) -> None:
    """``B2R.RESULT RZ, P0``: what BAR.RED found."""
    m.put_truth(i.at[1], m.votes, lanes)


# ---- exchanges ---------------------------------------------------------------------------------------------------


def shfl(m: Machine, i: Decoded, lanes: Array) -> None:
    """``SHFL.BFLY PT, R1, R2, 0x4, 0x1f``: among whole warps."""
    whole = m.whole_warps(lanes)
    if (whole & ~lanes & (m.state != ENDED)).any():
        raise DivergenceError("SHFL among lanes some of which are elsewhere")
    lane = np.arange(m.lanes)
    by = i.at[3].integer(m).astype(np.int64) & 31
    source = {
        "BFLY": lane ^ by,
        "IDX": (lane & ~31) | by,
        "UP": np.where((lane & 31) >= by, lane - by, lane),
        "DOWN": np.where((lane & 31) + by < 32, lane + by, lane),
    }[i.modifiers[0]]
    m.put(i.at[1], i.at[2].raw(m)[source], lanes)


def vote(m: Machine, i: Decoded, lanes: Array) -> None:
    """``VOTE.ANY R1, P0, P2``: the mask of lanes, and whether any, or all, say so."""
    says = i.at[-1].truth(m)
    masks, all_masks = m.masks(says & lanes), m.masks(lanes)
    if not i.at[0].predicate:
        m.put(i.at[0], masks, lanes)
    for outcome in i.at[:-1]:
        if outcome.predicate:
            m.put_truth(outcome, masks == all_masks if "ALL" in i.modifiers else masks != 0, lanes)


def redux(m: Machine, i: Decoded, lanes: Array) -> None:
    """``REDUX.MAX UR4, R5``, ``REDUX.OR``: over the lanes of a warp, all of them."""
    if (m.whole_warps(lanes) & ~lanes & (m.state != ENDED)).any():
        raise DivergenceError("REDUX among lanes some of which are elsewhere")
    values = i.at[1].raw(m).reshape(-1, WARP)
    values = values.view(np.int32) if "S32" in i.modifiers else values
    kind = {"MAX": np.maximum, "MIN": np.minimum, "OR": np.bitwise_or, "AND": np.bitwise_and, "SUM": np.add}
    reduce = next((kind[name] for name in i.modifiers if name in kind), np.bitwise_or)
    m.put(i.at[0], np.repeat(reduce.reduce(values, 1).view(np.uint32), WARP), lanes)


JUMPS = {
    "BRA": branch, "CALL": call, "RET": ret, "EXIT": leave, "BREAK": break_, "BSYNC": bsync, "WARPSYNC": warpsync,
    "BAR": bar,
}  # fmt: skip
STEPS = JUMPS | {
    "BSSY": bssy, "BMOV": bmov, "B2R": b2r, "SHFL": shfl, "VOTE": vote, "REDUX": redux,
    **dict.fromkeys(["NOP", "YIELD", "ENDCOLLECTIVE", "ERRBAR", "CGAERRBAR", "MEMBAR", "CCTL", "DEPBAR"], nothing),
}  # fmt: skip
