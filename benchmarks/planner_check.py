"""The planner's predictions against the link lab's measurements: what `plan` would have said of these links.

run as:  python benchmarks/planner_check.py        (after link_lab.py and bench_recipes.py; measures nothing itself)

A link's rate is the one it was given; its latency is that of the smallest exact call measured on it; the codec's speed
is that of bench_recipes.py on one core. Nothing is fitted to the times that are compared. Writes planner_check.json.
"""

from __future__ import annotations

import json
from typing import Any

import record
from link_hosts import bits_per_second

import flashcomm_megatron as fc
from flashcomm_megatron.tools.plan.cost import Collective, Compression, on_cpu, seconds
from flashcomm_megatron.tools.plan.hardware import Link
from flashcomm_megatron.tools.plan.measured import link

GB = 1e9
LAYERS, HIDDEN, TOKENS = 4, 512, 4 * 256  # of the model in link_ranks.py
Row = dict[str, Any]


def main() -> None:
    lab = json.loads((record.RESULTS / "link_lab.json").read_text())["rows"]
    recipes = json.loads((record.RESULTS / "recipes.json").read_text())["rows"]
    auto = next(row for row in recipes if row["recipe"] == "auto" and row["bits"] == 4 and row["feedback"])
    speed = on_cpu(fc.Config(bits=4), auto["encode_gbs"] * GB, auto["decode_gbs"] * GB)
    rows = [compared(row, wire(lab, row), speed) for row in lab if row["rate"] != "loopback" and wanted(row)]
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        print("  ".join(f"{cell:>12}" for cell in cells))
    near = sum(abs(row[name] - 1) <= 0.2 for row in rows for name in ("exact", "quantized"))
    print(f"{near} of {2 * len(rows)} predictions are within 20 % of what was measured")
    record.save("planner_check", rows)


def wanted(row: Row) -> bool:
    """4 bits on links that the wire bounds; the first token, and tensors whose time is not all latency.

    At 10 Gbit/s and more two cores cannot fill the link: gloo's copies take the time, which the planner does not know.
    """
    if bits_per_second(row["rate"]) > 1e9:
        return False
    return row["what"] == "first token" or (row.get("bits") == 4 and row["bytes"] >= 1 << 20)


def wire(lab: list[Row], row: Row) -> Link:
    """The link a row was measured on. gloo's all_gather is a ring: its smallest takes a latency for each other rank."""
    same = {"rate": row["rate"], "world": row["world"], "what": "all_gather"}
    smallest = min((each for each in lab if same.items() <= each.items()), key=lambda each: each["bytes"])
    return link(bits_per_second(row["rate"]) / 8, smallest["exact_ms"] / 1e3 / (row["world"] - 1), "link_lab.json")


def compared(row: Row, over: Link, compression: Compression) -> Row:
    """Predicted over measured time, exact and quantized."""
    if row["what"] == "first token":
        compute = row["compute_ms"] / 1e3
        sums = Collective("all_reduce", TOKENS * HIDDEN, row["world"], 2 * LAYERS)
    else:
        share = row["world"] if row["what"] == "all_gather" else 1
        compute, sums = 0.0, Collective(row["what"], row["bytes"] // 2 // share, row["world"])
    name = {"rate": row["rate"], "world": row["world"], "what": row["what"], "bytes": row.get("bytes")}
    exact = compute + seconds(over, stock(sums), None)
    quantized = compute + seconds(over, sums, compression)
    return {**name, "exact": 1e3 * exact / row["exact_ms"], "quantized": 1e3 * quantized / row["quantized_ms"]}


def stock(collective: Collective) -> Collective:
    """What gloo sends: its reduce_scatter is an all_reduce of which each rank keeps a part."""
    return collective._replace(kind="all_reduce") if collective.kind == "reduce_scatter" else collective


if __name__ == "__main__":
    main()
