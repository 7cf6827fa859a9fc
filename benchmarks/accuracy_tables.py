"""Put the results of bench_accuracy.py, bench_smollm2.py and bench_depth.py into docs/accuracy.md.

Each table stands between its mark, ``<!-- recipes -->`` for example, and ``<!-- end -->``.

run as:  python benchmarks/accuracy_tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
Row = dict[str, Any]
SPEEDS = ("encode GB/s", "decode GB/s")


def main() -> None:
    page = PAGE.read_text()
    tables: dict[str, Callable[[list[Row]], list[list[str]]]] = {
        "smollm2": smollm2,
        "massive": massive,
        "recipes": recipes,
        "feedback": feedback,
        "blocks": blocks,
        "speed": speed,
        "context": context,
        "drift": drift,
    }
    for name, table in tables.items():
        path = RESULTS / f"accuracy_{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            text = markdown(table(found["rows"])) + f"\n\n{source(found)}"
            page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{text}\n\g<2>", page, count=1, flags=re.S)
    PAGE.write_text(page)


def source(found: dict[str, Any]) -> str:
    """Where the rows come from; of the real model also the text."""
    row = found["rows"][0]
    text = f" {row['sequences']} windows of {row['length']} tokens." if "exact_perplexity" in row else ""
    return f"{origin(found['circumstances'])}{text}"


def smollm2(rows: list[Row]) -> list[list[str]]:
    """The real model: rises with their standard errors over the windows."""
    first = rows[0]
    exact = f"exact: {first['exact_perplexity']:.2f} +- {first['exact_perplexity_error']:.2f}"
    table = [["recipe", "bits", "on the wire", f"perplexity ({exact})", "rise", "agreement", "KL, nats a token"]]
    for row in rows:
        table.append(
            [
                row["recipe"],
                str(row["bits"]),
                f"{row['wire_bits']:.2f}",
                f"{row['perplexity']:.2f}",
                f"{row['rise']:+.2%} +- {row['rise_error']:.2%}",
                f"{row['agreement']:.1%}",
                f"{row['kl']:.5f}",
            ]
        )
    return table


def massive(rows: list[Row]) -> list[list[str]]:
    """A massive activation under each recipe; the exact value stands in the head."""
    exact, *others = rows
    value = f"feature {exact['feature']} (exact: {exact['value']:,.0f})"
    table = [["recipe", "bits", "feedback", value, "its error", "error of its row", "of the next row", "of other rows"]]
    for row in others:
        errors = [row[f"error of {which}"] for which in ("the feature", "its row", "the next row", "the other rows")]
        named = [row["recipe"], str(row["bits"]), "on" if row["feedback"] else "off", f"{row['value']:,.0f}"]
        table.append([*named, *(f"{each:.2%}" if each < 0.1 else f"{each:.0%}" for each in errors)])
    return table


def drift(rows: list[Row]) -> list[list[str]]:
    quarters = range(1, 5)
    head = ["4 bits", "tokens", "perplexity", *(f"{i}" for i in quarters), "repeated", *(f"{i}" for i in quarters)]
    return [
        [*head, "left after"],
        *(
            [
                each["variant"],
                f"{each['tokens']:,}",
                *(f"{each[name]:.2f}" for name in ("perplexity", *(f"perplexity {i}" for i in quarters))),
                *(f"{each[name]:.1%}" for name in ("repetition", *(f"repetition {i}" for i in quarters))),
                f"{each['diverged after']:.1f}",
            ]
            for each in rows
        ),
    ]


def markdown(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" + "|--:" * (len(rows[0]) - 1) + "|", *body])


def origin(found: Row) -> str:
    return f"*{found['cpu']}, torch {found['torch']}, commit {found['commit']}*"


def recipes(rows: list[Row]) -> list[list[str]]:
    table = [
        ["recipe", "bits", "wire TP2", "TP2", "agreement", "same text", "wire TP8", "TP8", "agreement", "same text"]
    ]
    for one, other in pairs(rows, "recipe", "bits"):
        cells = [
            [f"{r['wire_bits']:.2f}", rise(r), f"{r['agreement']:.1%}", f"{r['diverged_after']:.0f}"]
            for r in (one, other)
        ]
        table.append([one["recipe"], str(one["bits"]), *cells[0], *cells[1]])
    return table


def feedback(rows: list[Row]) -> list[list[str]]:
    table = [["bits", "TP2 with", "TP2 without", "TP8 with", "TP8 without"]]
    for bits in dict.fromkeys(row["bits"] for row in rows):
        cells = {(row["tp"], row["feedback"]): rise(row) for row in rows if row["bits"] == bits}
        table.append([str(bits), cells[2, True], cells[2, False], cells[8, True], cells[8, False]])
    return table


def blocks(rows: list[Row]) -> list[list[str]]:
    table = [["model", "recipe", "block", "wire TP2", "TP2", "wire TP8", "TP8", "attention dB", "MLP dB"]]
    for one, other in pairs(rows, "model", "recipe", "block"):
        wire = [f"{each['wire_bits']:.2f}" for each in (one, other)]
        decibels = [f"{one[f'decibels {kind}']:.1f}" for kind in ("self_attn.o_proj", "mlp.down_proj")]
        named = [one["model"], one["recipe"], str(one["block"])]
        table.append([*named, wire[0], rise(one), wire[1], rise(other), *decibels])
    return table


def speed(rows: list[Row]) -> list[list[str]]:
    named = [f"{recipe}, {what}" for recipe in dict.fromkeys(row["recipe"] for row in rows) for what in SPEEDS]
    table = [["block", *named]]
    for block in dict.fromkeys(row["block"] for row in rows):
        table.append([str(block), *(f"{r[what]:.2f}" for r in rows if r["block"] == block for what in SPEEDS)])
    return table


def context(rows: list[Row]) -> list[list[str]]:
    quarters = [f"{what} {i}" for what in ("rise", "agreement") for i in range(1, 5)]
    body = [
        [f"{r['recipe']} TP{r['tp']}", *(f"{r[each]:.1%}" for each in quarters), f"{r['diverged_after']:.0f}"]
        for r in rows
    ]
    return [["4 bits", *quarters, "same text"], *body]


def pairs(rows: list[Row], *keys: str) -> list[tuple[Row, Row]]:
    """Rows of TP2 and TP8 that agree in ``keys``."""
    by: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        by.setdefault(tuple(row[key] for key in keys), {})[row["tp"]] = row
    return [(each[2], each[8]) for each in by.values()]


def rise(row: Row) -> str:
    return f"{row['rise']:.2%}" if row["rise"] < 0.1 else f"{row['rise']:.0%}"


if __name__ == "__main__":
    main()
