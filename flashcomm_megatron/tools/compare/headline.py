"""What won, in one sentence: the first of the page, and of the W&B workspace.

4 bits: 2.9x fewer bytes, loss +0.01 %, steps 1.9x faster                       one run beside the baseline
Against exact: flash-3 sends the fewest bytes (4.9x fewer), the lowest loss ...  several
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .runs import OURS, Run
from .table import Comparison, common_step, difference, ended_early, final_loss, last, last_step, speed

SAME = 0.005  # ratios nearer to one count as equal


class Gains(NamedTuple):
    """One run beside the baseline: how many times fewer bytes, the loss' relative difference, how many times faster."""

    run: Run
    fewer_bytes: float | None
    loss: float | None
    faster: float | None


def headline(what: Comparison) -> str:
    """The sentence; "" without a baseline or with nothing beside it."""
    others = [run for run in what.runs if run is not what.baseline]
    if what.baseline is None or not others:
        return ""
    found = [_gains(run, what) for run in others]
    text = _one(found[0], what) if len(found) == 1 else _several(found, what)
    return text and f"{text}."


def _gains(run: Run, what: Comparison) -> Gains:
    loss = difference(final_loss(what.loss), run, what) if what.loss else None
    if what.loss and not math.isfinite(final_loss(what.loss)(run, common_step(what.runs)) or 0):
        loss = math.nan
    slower, more = difference(speed, run, what), difference(last(f"{OURS}wire-bytes"), run, what)
    if more is not None and more > -1:
        fewer: float | None = 1 / (1 + more)
    else:  # the baseline counted no bytes: beside what an exact run would have sent
        fewer = last(f"{OURS}compression")(run, common_step(what.runs))
    return Gains(run, fewer, loss, None if slower is None else 1 + slower)


# ---- words ---------------------------------------------------------------------------------------------------------


def _one(gains: Gains, what: Comparison) -> str:
    said = []
    if gains.fewer_bytes is not None:
        said.append(_times(gains.fewer_bytes, "fewer bytes", "more bytes", "as many bytes"))
    if gains.loss is not None:
        said.append("loss is not finite" if math.isnan(gains.loss) else f"loss {100 * gains.loss:+.2f} %")
    if gains.faster is not None:
        said.append(f"steps {_times(gains.faster, 'faster', 'slower', 'as fast')}")
    early = f" (until step {last_step(gains.run):.0f}, where it ended)" if gains.run in ended_early(what.runs) else ""
    bits = gains.run.settings.get("bits")
    return f"{f'{bits} bits' if bits else gains.run.name}: {', '.join(said)}{early}" if said else ""


def _times(ratio: float, more: str, less: str, same: str) -> str:
    if abs(ratio - 1) < SAME:
        return same
    return f"{ratio:.1f}x {more}" if ratio > 1 else f"{1 / ratio:.1f}x {less}"


def _several(found: Sequence[Gains], what: Comparison) -> str:
    """The best run by bytes, by loss and by time, of those that did not end early."""
    early = ended_early(what.runs)
    whole = [gains for gains in found if gains.run not in early]
    said = []
    if best := _best(whole, lambda gains: gains.fewer_bytes):
        said.append(
            f"{best.run.name} sends the fewest bytes ({_times(best.fewer_bytes or 1, 'fewer', 'more', 'as many')})"
        )
    if best := _best(whole, lambda gains: None if gains.loss is None else -gains.loss):
        said.append(f"{best.run.name} has the lowest loss ({100 * (best.loss or 0):+.2f} %)")
    if best := _best(whole, lambda gains: gains.faster):
        said.append(f"{best.run.name} is the fastest ({_times(best.faster or 1, 'faster', 'slower', 'as fast')})")
    if not said or what.baseline is None:
        return ""
    count = f"{len(whole)} runs" if not early else f"{len(whole)} runs that did not end early"
    return f"Of {count} beside {what.baseline.name}: {', '.join(said)}"


def _best(found: Sequence[Gains], value: Callable[[Gains], float | None]) -> Gains | None:
    known = [(number, gains) for gains in found if (number := value(gains)) is not None and math.isfinite(number)]
    return max(known, key=lambda pair: pair[0])[1] if known else None
