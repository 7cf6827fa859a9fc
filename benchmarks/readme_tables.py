"""Put the measured tables into README.md and docs/links.md, between marks like ``<!-- codec -->`` and ``<!-- end -->``.

run as:  python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accuracy_tables import RESULTS, markdown, origin

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


def main() -> None:
    pages: dict[str, dict[str, Callable[[], str]]] = {
        "README.md": {"recipes": recipes, "codec": codec, "collectives": collectives},
        "docs/links.md": {"links": links, "model": model, "overlap": overlap, "traffic": traffic, "planner": planner},
    }
    for name, tables in pages.items():
        page = (ROOT / name).read_text()
        for mark, table in tables.items():
            text = table()
            page = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", rf"\g<1>{text}\n\g<2>", page, count=1, flags=re.S)
        (ROOT / name).write_text(page)


def read(name: str) -> tuple[list[Row], str]:
    """The rows of a result, and the line that says where they come from."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return found["rows"], origin(found["circumstances"])


def recipes() -> str:
    """Accuracy and speed of the rows that bench_recipes.py has timed."""
    rows, source = read("accuracy_recipes")
    scores = {(row["recipe"], row["bits"], row["tp"]): row for row in rows}
    costs = {(row["recipe"], row["bits"]): row["cost"] for row in read("recipes")[0]}  # with feedback where there is
    table = [["recipe", "bits", "on the wire, TP2 / TP8", "perplexity, TP2", "TP8", "codec cost"]]
    for recipe, bits in dict.fromkeys((row["recipe"], row["bits"]) for row in rows):
        if (recipe, bits) in costs:
            two, eight = (scores[recipe, bits, world] for world in (2, 8))
            wire = f"{two['wire_bits']:.2f} / {eight['wire_bits']:.2f}"
            cost = f"{costs[recipe, bits]:.1f}x"
            table.append([recipe, str(bits), wire, f"{two['rise']:+.2%}", f"{eight['rise']:+.2%}", cost])
    return f"{markdown(table)}\n\n{source} Codec cost: encode and decode on one core against a plain 4-bit codec."


def codec() -> str:
    """The plain codec against memcpy."""
    rows, source = read("codec")
    largest = max(row["bytes"] for row in rows)
    table = [["bfloat16, one core, block 64", "encode / memcpy", "decode / memcpy", "encode GB/s", "decode GB/s"]]
    for row in rows:
        if row["dtype"] == "bfloat16" and row["bytes"] == largest:
            ratios = [f"{row['encode_ratio']:.2f}", f"{row['decode_ratio']:.2f}"]
            table.append([f"{row['bits']} bits", *ratios, f"{row['encode_gbs']:.1f}", f"{row['decode_gbs']:.1f}"])
    return f"{markdown(table)}\n\n{source}"


def collectives() -> str:
    """4-bit collectives over loopback gloo, by size."""
    rows, source = read("collectives")
    sizes = sorted({row["bytes"] for row in rows})
    table = [["speed-up over torch.distributed, gloo loopback, 4 bits", *(f"{size // 1024} KiB" for size in sizes)]]
    for world, name, recipe in dict.fromkeys((r["world"], r["collective"], r["recipe"]) for r in rows):
        chosen = {"world": world, "collective": name, "recipe": recipe, "bits": 4}
        found = {row["bytes"]: row["speedup"] for row in rows if chosen.items() <= row.items()}
        table.append([f"{name}, {world} ranks, {recipe}", *(f"{found[size]:.2f}" for size in sizes)])
    return f"{markdown(table)}\n\n{source}"


def links() -> str:
    """All-reduce at 4 bits on every link, by size."""
    rows, source = read("link_lab")
    chosen = [row for row in rows if row["what"] in ("all_reduce", "reduce_scatter", "all_gather") and row["bits"] == 4]
    sizes = sorted({row["bytes"] for row in chosen})
    table = [["speed-up over stock, 4 bits", *(_size(size) for size in sizes)]]
    for rate, world, what in dict.fromkeys((row["rate"], row["world"], row["what"]) for row in chosen):
        same = {"rate": rate, "world": world, "what": what}
        found = {row["bytes"]: f"{row['speedup']:.2f}" for row in chosen if same.items() <= row.items()}
        table.append([f"{rate}, {world} ranks, {what}", *(found.get(size, "") for size in sizes)])
    return f"{markdown(table)}\n\n{source}"


def model() -> str:
    """Work of a model on every link."""
    rows, source = read("link_lab")
    table = [["link", "work", "compute ms", "stock ms", "4 bits ms", "speed-up", "bound", "of the bound"]]
    for row in (row for row in rows if "compute_ms" in row):
        sending = max(row["exact_ms"] - row["compute_ms"], 0.0)
        bound = row["exact_ms"] / (row["compute_ms"] + sending / row["compression"])
        times = [f"{row[name]:.1f}" for name in ("compute_ms", "exact_ms", "quantized_ms")]
        ratios = [f"{row['speedup']:.2f}", f"{bound:.2f}", f"{row['speedup'] / bound:.0%}"]
        table.append([f"{row['rate']}, TP{row['world']}", row["what"], *times, *ratios])
    return f"{markdown(table)}\n\n{source}"


def overlap() -> str:
    """Large tensors in one piece and in several."""
    rows, source = read("link_lab")
    table = [["link", "collective", "size", "one piece ms", "pieces ms", "gain", "of what the bytes allow"]]
    for row in (row for row in rows if "whole_ms" in row and row["bits"] == 4):
        times = [f"{row[name]:.1f}" for name in ("whole_ms", "quantized_ms")]
        gain = [f"{row['whole_ms'] / row['quantized_ms']:.2f}", f"{row['speedup'] / row['compression']:.0%}"]
        table.append([f"{row['rate']}, {row['world']} ranks", row["what"], _size(row["bytes"]), *times, *gain])
    return f"{markdown(table)}\n\n{source}"


def traffic() -> str:
    """Bytes between machines, by the interface and by our count."""
    rows, source = read("link_nodes")
    table = [["tensor", "counted", "by the interfaces", "ratio"]]
    for row in (row for row in rows if "counted_bytes" in row):
        cells = [f"{row['counted_bytes']:,}", f"{row['interface_bytes']:,}", f"{row['interface_over_counted']:.4f}"]
        table.append([_size(row["bytes"]), *cells])
    return f"{markdown(table)}\n\n{source}"


def planner() -> str:
    """Predicted over measured time."""
    rows, source = read("planner_check")
    table = [["link", "work", "size", "exact, predicted / measured", "4 bits, predicted / measured"]]
    for row in rows:
        ratios = [f"{row['exact']:.2f}", f"{row['quantized']:.2f}"]
        size = _size(row["bytes"]) if row["bytes"] else ""
        table.append([f"{row['rate']}, {row['world']} ranks", row["what"], size, *ratios])
    return f"{markdown(table)}\n\n{source}"


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


if __name__ == "__main__":
    main()
