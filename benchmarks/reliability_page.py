"""Fill the tables of docs/reliability.md from benchmarks/results and from the tests' own tables.

run as:  python benchmarks/reliability_page.py

Faults come from faults.json (fault_table.py), long runs from soak.json and fuzz.json, invariants from
tests/mutations.py, with the outcome of mutations.json if they were run.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import RESULTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    """Write the page."""
    text = PAGE.read_text()
    for name, lines in {"faults": fault_lines(), "evidence": evidence(), "invariants": invariants()}.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        body = "\n".join(lines) + "\n"
        text, count = between.subn(lambda found, body=body: found[1] + body + found[2], text)
        assert count == 1, f"{PAGE} has {count} places for {name}"
    PAGE.write_text(text)


def load(name: str) -> dict[str, Any]:
    """One file of results, empty where it was not made."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def fault_lines() -> Iterator[str]:
    """One line a fault: what the others are told, and when, by transport."""
    found = load("faults")
    yield "| one rank | the others are told (shared memory) | shared memory | connections | gloo |"
    yield "|---|---|--:|--:|--:|"
    rows = found["rows"]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        by_transport = [row for row in rows if row["fault"] == fault]
        told = re.sub(
            r"\.? (This group's streams|Look for|Is it) .*|: every rank must .*|\[/__w\S+", "", by_transport[0]["told"]
        )
        yield f"| {fault} | {told.strip()} | {' | '.join(str(row['seconds']) + ' s' for row in by_transport)} |"
    yield ""
    yield f"*`tests/test_faults.py`; {found['circumstances']['cpu']}, commit {found['circumstances']['commit']}*"


def evidence() -> Iterator[str]:
    """One line for each long run."""
    yield "| what | how much | commit |"
    yield "|---|---|---|"
    for run in load("fuzz").get("runs", []):
        much = f"{run['runs']:,} inputs in {run['seconds'] / 60:.0f} minutes, {run['edges']:,} edges"
        yield f"| fuzzing {run['target']} | {much} | {run['commit']} |"
    for run in load("soak").get("runs", []):
        much = (
            f"{run['calls']:,} calls in {run['parts']} runs on {run['ranks']} ranks: {run['exact']:,} compared with "
            f"the true result, {run['specified']:,} with the specification, all between ranks; memory grew by at most "
            f"{run['KiB most']:,} KiB from a tenth of a run to its end"
        )
        yield f"| soak | {much} | {run['commit']} |"
    if found := load("long_training"):
        losses = f"{found['loss of the first tenth']:.4f} to {found['of the last']:.4f}"
        memory = found["KiB late"] - found["KiB early"]
        much = (
            f"{found['steps']:,} steps, {found['quantized']:,} compressed collectives, loss {losses}; resumed half way "
            f"to the same weights, bit for bit; memory grew by {memory:,} KiB"
        )
        yield f"| training | {much} | {found['circumstances']['commit']} |"


def invariants() -> Iterator[str]:
    """One line a mutation."""
    from mutations import MUTATIONS

    yield "| invariant | broken in | tests that fail |"
    yield "|---|---|---|"
    for each in MUTATIONS:
        yield f"| {each.invariant} | `{each.file}` | `{each.tests}` |"


if __name__ == "__main__":
    main()
