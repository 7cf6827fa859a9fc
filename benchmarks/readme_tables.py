"""Put the measured tables into README.md and docs/, between marks like ``<!-- codec -->`` and ``<!-- end -->``.

Run it again after a measurement: every table is read from benchmarks/results, except that the projected rows of README
and of docs/links.md come from ``python -m flashcomm_megatron plan`` and the flags of docs/options.md from Config.

run as:  python benchmarks/readme_tables.py
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accuracy_tables import RESULTS, markdown, origin

from flashcomm_megatron.config import VARIABLES, Config

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
# Results that README's table of accuracy is made of, the best first, and what the table is headed by.
ACCURACY = (
    ("accuracy_smollm2", "SmolLM2-135M, a real language model of 30 layers, on WikiText; rise of perplexity:"),
    ("accuracy_recipes", "stories3M, a stress test: tiny, with one huge feature:"),
)
SHOWN = (("auto", 8), ("auto", 6), ("auto", 4), ("flash-v1", 4), ("flash-v2", 4), ("mx", 4), ("outlier", 4))


def main() -> None:
    pages: dict[str, dict[str, Callable[[], str]]] = {
        "README.md": {"demo": demo, "pays": pays, "recipes": recipes},
        "docs/speed.md": {"codec": codec, "collectives": collectives},
        "docs/links.md": {"links": links, "model": model, "overlap": overlap, "traffic": traffic, "planner": planner},
        "docs/options.md": {"options": options, "variables": variables},
        "benchmarks/rivals.md": {"ours": ours, "traffic": traffic},
    }
    for name, tables in pages.items():
        page = (ROOT / name).read_text()
        for mark, table in tables.items():
            try:
                text = table()
            except FileNotFoundError as missing:
                print(f"{name}: table {mark} stays as it is: {missing.filename} does not exist")
                continue
            page = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", rf"\g<1>{text}\n\g<2>", page, count=1, flags=re.S)
        (ROOT / name).write_text(page)


def read(name: str) -> tuple[list[Row], str]:
    """The rows of a result, and the line that says where they come from."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return found["rows"], origin(found["circumstances"])


def demo() -> str:
    """What ``make demo`` printed when benchmarks/results/demo.json was written by ``examples/demo.py --out``."""
    sys.path.insert(0, str(ROOT / "examples"))
    from demo import Result, table

    rows, source = read("demo")
    results = {row["bits"]: Result(*(row[name] for name in Result._fields)) for row in rows}
    printed = "\n".join(f"    {line}" for line in table(results).splitlines())
    return f"{printed}\n\n{source} Over {rows[0]['link']}. Gains are against 16 bits, Megatron unchanged."


def pays() -> str:
    """Speed-ups: projected for GPUs by the planner, measured on CPUs in the link lab."""
    widths = (8, 6, 4)
    table = [["8 GPUs, first token of 8 prompts of 1024 tokens, llama-3-70b", "16-bit sums' share of the time",
              *(f"{bits} bits" for bits in widths), "training step of as many tokens, 8 bits"]]  # fmt: skip
    for gpu, link in (("L40", "PCIe 4, two sockets"), ("A100", "NVLink 3"), ("H100", "NVLink 4")):
        exact, *others = planned(gpu, widths)
        gains = [f"{row['ttft_speed_up']:.2f}x" for row in others]
        training = f"{others[0]['training_speed_up']:.2f}x"
        table.append([f"{gpu}, {link}", f"{exact['communication']:.0%}", *gains, training])
    rows, source = read("link_lab")
    work = ("first token", "training step")
    measured = [["2 hosts of one CPU core, model of 4 layers, hidden size 512", *(f"{each}, 4 bits" for each in work)]]
    for rate in ("100mbit", "1gbit", "10gbit"):
        found = {row["what"]: row for row in rows if (row["rate"], row["world"]) == (rate, 2)}
        gains = [f"{found[each]['speedup']:.2f}x" for each in work]
        measured.append([rate.replace("mbit", " Mbit/s").replace("gbit", " Gbit/s"), *gains])
    projected = (
        "**Projected** by `plan` from published rates and kernel times, with one fused kernel for each sum "
        "(`--flash-comm-transport peer`; the default goes over NCCL until a GPU has measured both); nothing here ran:"
    )
    ours = "**Measured**, CPU ranks in network namespaces over a link that is held to a rate, gloo:"
    return f"{projected}\n\n{markdown(table)}\n\n{ours}\n\n{markdown(measured)}\n\n{source}"


def planned(gpu: str, widths: Sequence[int]) -> list[Row]:
    """What ``plan`` expects of eight GPUs at 16 bits and at ``widths``."""
    bits = ",".join(map(str, widths))
    command = [sys.executable, "-m", "flashcomm_megatron", "plan", "--gpu", gpu, "--tp", "8", "--bits", bits, "--json"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: list[Row] = json.loads(ran.stdout)["rows"]
    return found


def recipes() -> str:
    """Accuracy at eight and fewer bits: a real language model's where it was measured, else the stress test's."""
    name, model = next(each for each in ACCURACY if (RESULTS / f"{each[0]}.json").exists())
    rows, source = read(name)
    worlds = sorted({row["tp"] for row in rows})
    table = [["recipe", "bits", *(f"{what}, TP{world}" for world in worlds for what in ("bits sent", "perplexity"))]]
    for recipe, bits in SHOWN:
        found = {row["tp"]: row for row in rows if (row["recipe"], row["bits"]) == (recipe, bits)}
        if found:
            pairs = [(f"{row['wire_bits']:.2f}", _rise(row)) for row in map(found.get, worlds) if row]
            table.append([recipe, str(bits), *(cell for pair in pairs for cell in pair)])
    return f"{model}\n\n{markdown(table)}\n\n{source}"


def _rise(row: Row) -> str:
    """The rise of perplexity with its standard error over the windows, where it was measured."""
    error = row.get("rise_error")
    return f"{row['rise']:+.2%}" + (f" \u00b1 {100 * error:.2f}" if error is not None else "")


def codec() -> str:
    """The plain codec against memcpy, one table for each processor that was measured."""
    return "\n\n".join(_codec(path.stem) for path in sorted(RESULTS.glob("codec*.json")))


def _codec(name: str) -> str:
    rows, source = read(name)
    largest = max(row["bytes"] for row in rows)
    head = f"bfloat16, one core ({rows[0]['isa']}), block 64"
    table = [[head, "encode GB/s", "decode GB/s", "encode, of memcpy's GB/s", "decode"]]
    for row in rows:
        if row["dtype"] == "bfloat16" and row["bytes"] == largest:
            ratios = [f"{row['encode_ratio']:.2f}x", f"{row['decode_ratio']:.2f}x"]
            table.append([f"{row['bits']} bits", f"{row['encode_gbs']:.1f}", f"{row['decode_gbs']:.1f}", *ratios])
    return f"{markdown(table)}\n\n{source}"


def collectives() -> str:
    """4-bit collectives over loopback gloo, by size."""
    rows, source = read("collectives")
    sizes = sorted({row["bytes"] for row in rows})
    heads = [f"{size // 1024} KiB" for size in sizes]
    table = [["speed-up over torch.distributed, gloo loopback, 4 bits", "fewer bytes", *heads]]
    for world, name, recipe in dict.fromkeys((r["world"], r["collective"], r["recipe"]) for r in rows):
        chosen = {"world": world, "collective": name, "recipe": recipe, "bits": 4}
        found = {row["bytes"]: row["speedup"] for row in rows if chosen.items() <= row.items()}
        fewer = max(row["byte_ratio"] for row in rows if chosen.items() <= row.items())
        gains = [f"{found[size]:.2f}" for size in sizes]
        table.append([f"{name}, {world} ranks, {recipe}", f"{fewer:.2f}", *gains])
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
    """Large tensors: what compression gains beside the same messages of 16 bits, and what pieces do."""
    rows, source = read("link_lab")
    names = {"exact_ms": "stock ms", "uncoded_ms": "16 bits, our messages ms", "quantized_ms": "4 bits ms"}
    table = [["link", "collective", "size", *names.values(), "gain over 16 bits", "4 bits in one piece ms"]]
    for row in (row for row in rows if "uncoded_ms" in row and row["bits"] == 4):
        times = [f"{row[name]:.1f}" for name in names]
        gain = f"{row['uncoded_ms'] / row['quantized_ms']:.2f}"
        whole = f"{row['whole_ms']:.1f}" if "whole_ms" in row else ""
        table.append([f"{row['rate']}, {row['world']} ranks", row["what"], _size(row["bytes"]), *times, gain, whole])
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


def options() -> str:
    """Every flag, with the help that Megatron's --help prints."""
    table = [["flag", "what it does", "default"]]
    for field in dataclasses.fields(Config):
        default = "off" if field.default in (dataclasses.MISSING, False) else field.default
        shown = "" if default is None else f"`{default}`"
        table.append([f"`--flash-comm-{field.name.replace('_', '-')}`", field.metadata["help"], shown])
    return _text(table)


def variables() -> str:
    """Every environment variable."""
    return _text([["variable", "what it does"], *([f"`{name}`", text] for name, text in VARIABLES.items())])


def ours() -> str:
    """Our side beside a rival: a first token and a decoding step at 1 Gbit/s on four hosts."""
    rows, source = read("link_lab")
    table = [["4 hosts, 1 Gbit/s", "bits", "whole ms", "in sums ms (whole - compute)", "16 bits, whole ms"]]
    for row in rows:
        if "compute_ms" in row and row["world"] == 4 and row["rate"] == "1gbit" and row["what"] != "training step":
            sums = max(row["quantized_ms"] - row["compute_ms"], 0.0)
            times = [f"{row['quantized_ms']:.1f}", f"{sums:.1f}", f"{row['exact_ms']:.1f}"]
            table.append([row["what"], str(row.get("bits", 4)), *times])
    return f"{markdown(table)}\n\n{source}"


def _text(rows: list[list[str]]) -> str:
    """A table whose columns hold words, so that they begin at the left."""
    head, *body = markdown(rows).splitlines()
    return "\n".join([head, body[0].replace("--:", "---"), *body[1:]])


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


if __name__ == "__main__":
    main()
