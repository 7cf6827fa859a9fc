"""Put the measured tables into README.md, between marks like ``<!-- codec -->`` and ``<!-- end -->``.

run as:  python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from accuracy_tables import RESULTS, markdown, origin

README = Path(__file__).parents[1] / "README.md"
Row = dict[str, Any]


def main() -> None:
    page = README.read_text()
    for name, table in {"recipes": recipes, "codec": codec, "collectives": collectives}.items():
        text = table()
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{text}\n\g<2>", page, count=1, flags=re.S)
    README.write_text(page)


def read(name: str) -> tuple[list[Row], str]:
    """The rows of a result, and the line that says where they come from."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return found["rows"], origin(found["circumstances"])


def recipes() -> str:
    """Accuracy and speed at 4 bits, and auto at its other widths."""
    rows, source = read("accuracy_recipes")
    speed = {row["recipe"]: row for row in read("recipes")[0]}
    speed["auto"] = {**speed["auto"], "cost": speed["auto with feedback"]["cost"]}
    table = [["recipe", "bits", "on the wire, TP2 / TP8", "perplexity, TP2", "TP8", "codec cost"]]
    for two in (row for row in rows if row["tp"] == 2 and (row["bits"] == 4 or row["recipe"] == "auto")):
        other = {"recipe": two["recipe"], "bits": two["bits"], "tp": 8}
        eight = next(row for row in rows if other.items() <= row.items())
        fast = speed.get(two["recipe"]) if two["bits"] == 4 else None
        wire = f"{two['wire_bits']:.2f} / {eight['wire_bits']:.2f}"
        cost = f"{fast['cost']:.1f}x" if fast else ""
        table.append([two["recipe"], str(two["bits"]), wire, f"{two['rise']:+.2%}", f"{eight['rise']:+.2%}", cost])
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


if __name__ == "__main__":
    main()
