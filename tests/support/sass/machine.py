"""A grid of threads, all side by side in numpy rows: registers, branches, barriers, and whose turn it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import arithmetic, control, data, floating
from .disassembly import Instruction, Program
from .memory import Array, BadAccessError, GlobalMemory, SharedMemory
from .operands import TRUE_PREDICATE, Address, Operand
from .state import AT_CLOCK, ENDED, RUNNING, STATES, WARP, DivergenceError, KernelError

BITS = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
PARAMETERS = {"sm_80": 0x160, "sm_86": 0x160, "sm_89": 0x160, "sm_90": 0x210}  # where constant bank 0 has them
SHARED_BASE = {"sm_90": 0x400}  # what lies below is the system's


Step = Callable[["Machine", "Decoded", Array], None]


@dataclass
class Decoded:
    """An instruction whose operands are parsed, with what runs it."""

    source: Instruction
    step: Step
    at: list[Operand]
    address: Address | None
    jumps: bool  # decides itself where its lanes go on
    guard: Operand | None
    index: int
    next: int
    memo: Any = None  # what a step derives from the text once

    @property
    def modifiers(self) -> tuple[str, ...]:
        """``("GE", "U32", "AND")``"""
        return self.source.modifiers


def decode(program: Program) -> dict[int, Decoded]:
    """Every instruction with its parsed operands; one that nobody knows fails when it is run."""
    steps = arithmetic.STEPS | floating.STEPS | data.STEPS | control.STEPS
    addresses = sorted(program)
    following = dict(zip(addresses, [*addresses[1:], -1], strict=True))
    decoded = {}
    for index, address in enumerate(addresses):
        source = program[address]
        name = source.op if source.op in steps or not source.op.startswith("U") else source.op[1:]
        operands = [Operand(text) for text in source.operands if "[" not in text or text.lstrip("-~|").startswith("c[")]
        places = [text for text in source.operands if "[" in text and not text.lstrip("-~|").startswith("c[")]
        guard = Operand(("!" if source.negated else "") + source.guard) if source.guard else None
        decoded[address] = Decoded(
            source, steps.get(name, control.unknown), operands, Address(places[0]) if places else None,
            _jumps(source), guard, index, following[address],
        )  # fmt: skip
    return decoded


def _jumps(source: Instruction) -> bool:
    return source.op in control.JUMPS or source.op == "NANOSLEEP" or "GLOBALTIMER" in source.text


@dataclass
class Counts:
    """What a launch did: instructions are counted once a warp, as the hardware issues them."""

    instructions: int
    wavefronts: int
    ideal_wavefronts: int
    ops: Counter[str] = field(default_factory=Counter)
    global_widths: Counter[tuple[str, int]] = field(default_factory=Counter)
    shared_widths: Counter[tuple[str, int]] = field(default_factory=Counter)
    hot: Counter[int] = field(default_factory=Counter)


class Machine:
    """One launch: ``blocks`` of ``threads`` that run ``program`` with these parameter bytes."""

    def __init__(
        self, program: Program, architecture: str, memory: GlobalMemory, parameters: bytes, blocks: int,
        shared_bytes: int, threads: int = 256,
    ) -> None:  # fmt: skip
        self.code, self.memory = decode(program), memory
        self.lanes, self.blocks, self.threads = blocks * threads, blocks, threads
        self.shared = SharedMemory(blocks, SHARED_BASE.get(architecture, 0), shared_bytes)
        self.stacks = np.zeros((self.lanes, 4096), np.uint8)  # local memory
        self.block = np.repeat(np.arange(blocks), threads)
        self.warp = np.arange(self.lanes) // WARP
        self.registers = np.zeros((256, self.lanes), np.uint32)
        self.uniform = np.zeros((64, self.lanes), np.uint32)
        self.predicates = np.zeros((8, self.lanes), bool)
        self.uniform_predicates = np.zeros((8, self.lanes), bool)
        self.predicates[TRUE_PREDICATE] = self.uniform_predicates[TRUE_PREDICATE] = True
        self.barriers = np.zeros((16, self.lanes), np.uint32)  # lanes that a BSYNC waits for
        self.votes = np.ones(self.lanes, bool)  # of BAR.RED
        self.pc = np.full(self.lanes, min(self.code), np.int64)
        self.state = np.zeros(self.lanes, np.int8)
        self.clock = 0
        self.counted = np.zeros(len(self.code), np.int64)
        self._bank = np.zeros(0x1000, np.uint8)
        first = PARAMETERS[architecture]
        self._bank[first : first + len(parameters)] = np.frombuffer(parameters, np.uint8)
        self._bank[:16].view(np.uint32)[:] = threads, 1, 1, blocks
        self._numbers: dict[int, Array] = {}
        np.seterr(all="ignore")

    # ---- what operands read -----------------------------------------------------------------------------------------

    def number(self, bits: int) -> Array:
        """An immediate in every lane, not to be written to."""
        if bits not in self._numbers:
            self._numbers[bits] = np.full(self.lanes, bits, np.uint32)
        return self._numbers[bits]

    def constant(self, place: str, word: int = 0) -> Array:
        """``c[0x0][place]`` in every lane."""
        start = int(place, 16) + 4 * word
        return self.number(int(self._bank[start : start + 4].view(np.uint32)[0]))

    def constants(self, offsets: Array, size: int) -> Array:
        """[lanes, words] of the constant bank at an offset of each lane's own."""
        padded = self._bank[np.clip(offsets, 0, 0xFF0)[:, None] + np.arange(max(size, 4))].copy()
        padded[:, size:] = 0
        return padded.view(np.uint32)

    # ---- what instructions write ------------------------------------------------------------------------------------

    def put(self, where: Operand, value: Array, lanes: Array, word: int = 0) -> None:
        """Writes a register or the one ``word`` further on; a uniform one for the whole warp."""
        if not where.is_zero:
            rows = self.uniform if where.uniform else self.registers
            lanes = self.whole_warps(lanes) if where.uniform else lanes
            np.copyto(rows[where.index + word], value, where=lanes, casting="unsafe")

    def put_wide(self, where: Operand, value: Array, lanes: Array) -> None:
        """Writes two registers."""
        self.put(where, value & np.uint64(0xFFFFFFFF), lanes)
        self.put(where, value >> np.uint64(32), lanes, 1)

    def put_truth(self, where: Operand, value: Array, lanes: Array) -> None:
        """Writes a predicate."""
        if not where.is_zero:
            rows = self.uniform_predicates if where.uniform else self.predicates
            np.copyto(rows[where.index], value, where=self.whole_warps(lanes) if where.uniform else lanes)

    # ---- warps ------------------------------------------------------------------------------------------------------

    def masks(self, lanes: Array) -> Array:
        """For every lane the bits of those of its warp that are among ``lanes``."""
        return np.repeat((lanes.reshape(-1, WARP) * BITS).sum(1, dtype=np.uint32), WARP)

    def whole_warps(self, lanes: Array) -> Array:
        """``lanes`` and their neighbours."""
        return np.repeat(lanes.reshape(-1, WARP).any(1), WARP)

    # ---- turns ------------------------------------------------------------------------------------------------------

    def run(self, most: int = 20_000_000) -> Counts:
        """Runs every thread to its end; ``most``: rounds of all warps after which it is stuck."""
        for _ in range(most):
            if not self._turn():
                return self._counts()
        raise KernelError(f"no end after {most} turns: {self._waiting()}")

    def _turn(self) -> bool:
        """The lanes at the smallest address run until they jump or come to where others are. False: all have ended."""
        running = self.state == RUNNING
        if not running.any():
            return self._wake()
        at = np.where(running, self.pc, np.iinfo(np.int64).max)
        pc = int(at.min())
        group = at == pc
        others = np.where(group, np.iinfo(np.int64).max, at).min()
        warps = int(group.reshape(-1, WARP).any(1).sum())
        while True:
            instruction = self.code[pc]
            self.counted[instruction.index] += warps
            lanes = group & instruction.guard.truth(self) if instruction.guard else group
            if instruction.jumps:
                self.pc[group] = instruction.next
            try:
                instruction.step(self, instruction, lanes)
            except (BadAccessError, KernelError) as error:
                raise type(error)(f"{error}, at 0x{pc:x}: {instruction.source.text}") from None
            pc = instruction.next
            if instruction.jumps:
                return True
            if pc >= others:
                self.pc[group] = pc
                return True

    def _wake(self) -> bool:
        """Nobody runs: those go on that gave way to others."""
        waiting = self.state == AT_CLOCK
        if not waiting.any():
            if (self.state == ENDED).all():
                return False
            raise DivergenceError(f"threads wait for each other at different places: {self._waiting()}")
        self.clock += 1000
        self.state[waiting] = RUNNING
        return True

    def release(self, lanes: Array) -> None:
        """Lets lanes that wait go on behind the instruction at which they do."""
        self.state[lanes] = RUNNING
        self.pc[lanes] = [self.code[int(pc)].next for pc in self.pc[lanes]]

    def _waiting(self) -> str:
        places = Counter(
            (int(block), int(warp) % (self.threads // WARP), STATES[state], int(pc))
            for block, warp, state, pc in zip(self.block, self.warp, self.state, self.pc, strict=True) if state != ENDED
        )  # fmt: skip
        shown = [f"block {b} warp {w}: {n} lanes, {s} at 0x{pc:x}" for (b, w, s, pc), n in sorted(places.items())[:6]]
        return "; ".join(shown)

    def _counts(self) -> Counts:
        counts = Counts(int(self.counted.sum()), self.shared.wavefronts, self.shared.ideal)
        for address, instruction in self.code.items():
            counts.ops[instruction.source.op] += int(self.counted[instruction.index])
            counts.hot[address] = int(self.counted[instruction.index])
        counts.global_widths, counts.shared_widths = self.memory.widths, self.shared.widths
        return counts
