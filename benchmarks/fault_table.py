"""How long the others take to hear of every fault (tests/support/faults.py), and what; for docs/reliability.md.

    python benchmarks/fault_table.py     writes benchmarks/results/faults.csv and .json, and prints the table's rows

``seconds`` is the slowest survivor's, from its call to its error. Ranks wait ``faults.WAIT`` seconds for one that does
nothing; users wait as long as --flash-comm-timeout says.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from record import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
import faults
from ranks import spawn


def row(name: str, transport: str, survivors: list[faults.Heard], victim: str = "") -> dict[str, Any]:
    """One fault over one transport; ``victim``: what the rank at fault was warned of, in the same log."""
    told = [heard.warned or heard.text for heard in survivors] + [victim] * bool(victim)
    clearest = min(told, key=lambda text: not re.search(r"rank \d", text))
    text = re.sub(r"^flash-comm: |The process group says: .*$", "", clearest.splitlines()[0]).strip()
    seconds = max(heard.seconds for heard in survivors)
    return {"fault": name, "transport": transport, "seconds": round(seconds, 2), "told": text}


def measure(transport: str) -> list[dict[str, Any]]:
    """All faults over one transport."""
    alive = spawn(faults.alive, 3, transport)
    rows, victim = [], alive[faults.VICTIM]
    for name in (fault.name for fault in faults.LIVES):
        survivors = [heard[name] for heard in alive if heard is not victim]
        rows.append(row(name, transport, survivors, victim[name].warned))
    world = 2 * len(faults.ENDS)
    ended = spawn(faults.ending, world, transport, lost=range(1, world, 2))
    return rows + [row(fault.name, transport, [ended[2 * i]]) for i, fault in enumerate(faults.ENDS)]


def main() -> None:
    """Measure, save and print."""
    rows = [each for transport in faults.TRANSPORTS for each in measure(transport)]
    save("faults", rows)
    for fault in (*faults.LIVES, *faults.ENDS):
        seconds = [each["seconds"] for each in rows if each["fault"] == fault.name]
        told = next(each["told"] for each in rows if each["fault"] == fault.name)
        print(f"| {fault.name} | {told} | {' | '.join(map(str, seconds))} |")


if __name__ == "__main__":
    main()
