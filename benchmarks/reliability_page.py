"""Fill the tables of docs/reliability.md from benchmarks/results and from the tests' own tables.

run as:  python benchmarks/reliability_page.py

Faults come from faults.json (fault_table.py), long runs from soak.json, long_training.json, restarts.json, fuzz.json
and coverage.json, invariants from tests/stress/mutations.py.
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
sys.path.insert(0, str(ROOT / "tests" / "stress"))


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
    yield "| one rank | the others are told (shared memory) | shared memory | gloo |"
    yield "|---|---|--:|--:|"
    rows = found["rows"]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        by_transport = [row for row in rows if row["fault"] == fault]
        noise = r"\.? (This group's streams|Look for|Is it) .*|[:.] [eE]very rank must .*|\[/__w\S+"
        told = re.sub(noise, "", by_transport[0]["told"])
        yield f"| {fault} | {told.strip()} | {' | '.join(str(row['seconds']) + ' s' for row in by_transport)} |"
    yield ""
    yield f"*`tests/comm/test_faults.py`; {found['circumstances']['cpu']}, commit {found['circumstances']['commit']}*"


def evidence() -> Iterator[str]:
    """One line for each long run."""
    yield "| what | how much | commit |"
    yield "|---|---|---|"
    for run in load("fuzz").get("runs", []):
        much = f"{run['runs']:,} inputs in {run['seconds'] / 60:.0f} minutes, {run['edges']:,} edges"
        yield f"| fuzzing {run['target']} | {much} | {run['commit']} |"
    if found := load("soak"):
        ranks = found["ranks"]
        first, hours = ranks[0], ranks[0]["seconds"] / 3600
        most = max(rank["KiB late"] - rank["KiB early"] for rank in ranks)
        late = max(rank["KiB late"] - rank["KiB half"] for rank in ranks)
        much = (
            f"{first['calls']:,} calls in one run on {len(ranks)} ranks, {hours:.1f} hours on "
            f"{found['circumstances']['cores']} core: {first['exact']:,} compared with the true result, "
            f"{first['specified']:,} with the specification, all between ranks; memory grew by at most {most:,} KiB "
            f"from a tenth of the way to its end, {late:,} KiB of it in the second half"
        )
        yield f"| soak | {much} | {found['circumstances']['commit']} |"
    if found := load("long_training"):
        losses = f"{found['loss of the first tenth']:.4f} to {found['of the last']:.4f}"
        memory = found["KiB late"] - found["KiB early"]
        much = (
            f"{found['steps']:,} steps, {found['quantized']:,} compressed collectives, loss {losses}; resumed half way "
            f"to the same weights, bit for bit; memory grew by {memory:,} KiB"
        )
        yield f"| training | {much} | {found['circumstances']['commit']} |"
    if found := load("restarts"):
        for row in found["rows"]:
            much = f"{row['restarts']} restarts of {found['ranks']} ranks, none hung, every attempt's sums right"
            yield f"| torchrun, {row['transport']} | {much} | {found['circumstances']['commit']} |"
    if found := load("coverage"):
        for part, what in {"package": "of the Python package", "csrc": "of csrc, as built without CUDA"}.items():
            each = found[part]
            much = f"{each['percent']} % of {each['lines']:,} lines {what}, {each['not run']} not run"
            yield f"| coverage | {much} | {found['circumstances']['commit']} |"


def invariants() -> Iterator[str]:
    """One line a mutation."""
    from mutations import MUTATIONS

    yield "| invariant | broken in | tests that fail |"
    yield "|---|---|---|"
    for each in MUTATIONS:
        yield f"| {each.invariant} | `{each.function}` of `{each.room}` | `{each.tests}` |"


if __name__ == "__main__":
    main()
