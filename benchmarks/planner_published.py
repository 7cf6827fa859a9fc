"""What others measured and published, and what `plan` says of the same: the evidence for and against it.

run as:  python benchmarks/planner_published.py        (prints the comparison; docs/planner.md holds it)

Each figure tells how it stands to the model of costs: *held out*, nothing was set by it; *fitted*, a constant in
hardware.py was; *chosen*, it decided between two published constants. Misses carry the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flashcomm_megatron.config import Config
from flashcomm_megatron.tools.plan import PROJECTION
from flashcomm_megatron.tools.plan.cost import Collective, on_gpu, seconds
from flashcomm_megatron.tools.plan.hardware import US, gpu, link
from flashcomm_megatron.tools.plan.models import model
from flashcomm_megatron.tools.plan.printing import aligned
from flashcomm_megatron.tools.plan.serving import Job, Times, times

KIB, MIB = 2**10, 2**20
TOLERANCE = 0.2


class Figure(NamedTuple):
    """One published figure. ``low`` to ``high`` where a range was published."""

    what: str
    source: str
    low: float
    high: float
    predict: Callable[[], float]
    role: str = "held out"

    @property
    def text(self) -> str:
        """As published."""
        low, high = number(self.low), number(self.high)
        return low if low == high else f"{low} to {high}"

    @property
    def error(self) -> float:
        """Relative distance of the prediction from the published range; negative below it."""
        found = self.predict()
        return found / self.low - 1 if found < self.low else max(found / self.high - 1, 0.0)

    @property
    def holds(self) -> bool:
        return abs(self.error) <= TOLERANCE


FLASH = "Flash Communication, arXiv 2412.04964"
QUICKREDUCE = "QuickReduce README (mk1-project), MI300X, fp16"
AITER = "ROCm/aiter PR 801, MI300X TP2, fp16"
VLLM_ROCM = "vLLM PR 19744, MI300X TP4, fp16"
VLLM = "vLLM PR 39783, Llama-3.3-70B TP4, INT8, H100 or H200"


def all_reduce(name: str, tp: int, nbytes: int, bits: int, block: int = 128) -> float:
    """Seconds of a two-step all-reduce of ``nbytes`` bytes on ``tp`` GPUs; 16 bits: the vendor's exact one."""
    row = gpu(name)
    config = Config(bits=min(bits, 8), recipe="flash-v1", block=block, min_bytes=0)
    compression = None if bits == 16 else on_gpu(config, row)
    return seconds(link(row.link), Collective("all_reduce", nbytes // 2, tp), compression)


def serve(name: str, tp: int, bits: int) -> Times:
    """llama-3-70b, 8 prompts of 1024 tokens."""
    row = gpu(name)
    job = Job(row, link(row.link), model("llama-3-70b"), tp, 8, 1024)
    return times(job, None if bits == 16 else on_gpu(Config(bits=bits, recipe="flash-v1"), row))


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    print(f"plan: {PROJECTION}\n\n{aligned(HEADER, rows(), left=1)}")


HEADER = ("figure", "published", "plan", "off by", "role", "why it is more than 20 % off")


def rows() -> list[list[str]]:
    """The table's cells."""
    return [
        [f.what, f.text, number(f.predict()), f"{f.error:+.0%}", f.role, "" if f.holds else MISSES.get(f.what, "?")]
        for f in figures()
    ]


def figures() -> list[Figure]:
    """All of them."""
    return [*_papers(), *_quickreduce(), *_others()]


def _papers() -> Iterator[Figure]:
    """Tensor-parallel sizes and prompts are not known for these; 4 GPUs on L40, as in its motivation, 8 on A100."""
    gain = "all-reduce, L40 TP4, INT4 over exact, 256 MiB"
    yield Figure(
        gain, FLASH, 3.18, 3.18, lambda: all_reduce("L40", 4, 256 * MIB, 16) / all_reduce("L40", 4, 256 * MIB, 4)
    )
    for name, tp, published in (("L40", 4, 2.06), ("A100", 8, 1.19)):
        yield Figure(
            f"time to first token, {name} TP{tp}, exact over INT4",
            FLASH,
            published,
            published,
            lambda name=name, tp=tp: serve(name, tp, 16).ttft / serve(name, tp, 4).ttft,  # type: ignore[misc]
        )
    share = "communication in time to first token"
    yield Figure(f"{share}, L40 TP4", FLASH, 0.65, 0.65, lambda: serve("L40", 4, 16).communication, "chosen")
    yield Figure(f"{share}, A100 TP8", FLASH, 0.20, 0.20, lambda: serve("A100", 8, 16).communication)


# Microseconds of RCCL, 8, 6 and 4 bits by size.
WIDTHS = (16, 8, 6, 4)
QUICKREDUCE_TABLE: dict[tuple[int, int], tuple[float, float, float, float]] = {
    (2, 32 * KIB): (17.2, 20.5, 23.1, 20.2),
    (2, 1 * MIB): (37.2, 28.5, 27.7, 24.0),
    (2, 4 * MIB): (105.1, 63.3, 54.3, 42.2),
    (2, 16 * MIB): (376.3, 217.4, 174.4, 131.1),
    (2, 64 * MIB): (1464, 829, 651, 468),
    (4, 32 * KIB): (18.2, 23.3, 23.8, 23.2),
    (4, 1 * MIB): (39.4, 28.8, 29.2, 29.1),
    (4, 4 * MIB): (70.6, 54.2, 43.8, 40.3),
    (4, 16 * MIB): (205.4, 222.7, 162.6, 113.7),
    (4, 64 * MIB): (761, 640, 489, 374),
    (8, 32 * KIB): (16.2, 27.5, 28.8, 25.8),
    (8, 1 * MIB): (26.4, 32.7, 33.6, 31.9),
    (8, 4 * MIB): (52.1, 45.0, 47.0, 43.6),
    (8, 16 * MIB): (148.4, 157.6, 106.2, 82.8),
    (8, 64 * MIB): (426, 482, 372, 273),
}


def _quickreduce() -> Iterator[Figure]:
    """Blocks of 64 in our format take as many bytes as QuickReduce's of 32: 4.5, 6.5 and 8.5 bits a value."""
    for (tp, size), row in QUICKREDUCE_TABLE.items():
        for bits, us in zip(WIDTHS, row, strict=True):
            fitted = size == 32 * KIB or (tp, size, bits) == (8, 64 * MIB, 4)
            yield _micros(f"TP{tp} {_size(size)}", QUICKREDUCE, "MI300X", tp, size, bits, us, fitted)
        if size > 32 * KIB:
            yield Figure(
                f"all-reduce, MI300X TP{tp} {_size(size)}, 4 bits over exact",
                QUICKREDUCE,
                row[0] / row[3],
                row[0] / row[3],
                lambda tp=tp, size=size: _quick(tp, size, 16) / _quick(tp, size, 4),  # type: ignore[misc]
            )


def _quick(tp: int, size: int, bits: int) -> float:
    return all_reduce("MI300X", tp, size, bits, 64)


def _others() -> Iterator[Figure]:
    for bits, us in ((16, 11126.0), (6, 5014.0), (4, 3494.0)):
        yield _micros("TP2 512 MiB", AITER, "MI300X", 2, 512 * MIB, bits, us)
    for bits, us in ((8, 126.43), (6, 99.41), (4, 64.23)):
        yield _micros("TP4 8 MiB", VLLM_ROCM, "MI300X", 4, 8 * MIB, bits, us)
    what = "time to first token, {} TP4, exact over INT8"
    for name in ("H100", "H200"):
        yield Figure(
            what.format(name),
            VLLM,
            1.03,
            1.08,
            lambda name=name: serve(name, 4, 16).ttft / serve(name, 4, 8).ttft,  # type: ignore[misc]
        )


def _micros(
    what: str, source: str, name: str, tp: int, size: int, bits: int, us: float, fitted: bool = False
) -> Figure:
    how = "exact" if bits == 16 else f"{bits} bits"
    return Figure(
        f"all-reduce, {name} {what}, {how}, us",
        source,
        us,
        us,
        lambda: all_reduce(name, tp, size, bits, 64) / US,
        "fitted" if fitted else "held out",
    )


def _size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


# Figure -> why it is more than 20 % off. tests/tools/test_plan_published.py checks that these are all.
_OVERLAP = "QuickReduce's kernel sends one tile while it encodes the next; plan lets nothing overlap"
_RCCL = "RCCL reaches less of its links at medium sizes; plan knows one rate and one latency"
_OWN = "published time out of line with the same kernel's at 64 MiB, and slower than the exact one"
_M = "all-reduce, MI300X"
MISSES = {
    **{f"{_M} TP2 {size} MiB, {bits} bits, us": _OVERLAP for size in (1, 4) for bits in (8, 6, 4)},
    f"{_M} TP2 4 MiB, 4 bits over exact": _OVERLAP,
    f"{_M} TP4 1 MiB, exact, us": _RCCL,
    f"{_M} TP4 1 MiB, 4 bits over exact": _RCCL,
    f"{_M} TP4 4 MiB, 6 bits, us": _OVERLAP,
    f"{_M} TP4 4 MiB, 4 bits over exact": _RCCL,
    f"{_M} TP4 16 MiB, 8 bits, us": _OWN,
    f"{_M} TP8 4 MiB, exact, us": _RCCL,
    f"{_M} TP8 16 MiB, exact, us": _RCCL,
    f"{_M} TP8 16 MiB, 4 bits over exact": _RCCL,
    f"{_M} TP4 8 MiB, 8 bits, us": _OWN,
}


if __name__ == "__main__":
    main()
