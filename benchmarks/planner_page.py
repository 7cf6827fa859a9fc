"""Put the planner's tables into docs/planner.md, between marks like ``<!-- pays -->`` and ``<!-- end -->``, and draw.

run as:  python benchmarks/planner_page.py        (seconds; projections, nothing is measured)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flashcomm_megatron.config import Config  # noqa: E402
from flashcomm_megatron.tools.plan import nodes, plots, published, sweep, table  # noqa: E402
from flashcomm_megatron.tools.plan.cost import Codec, assumed_speed  # noqa: E402
from flashcomm_megatron.tools.plan.hardware import GB, GPUS, LINKS, US, link  # noqa: E402
from flashcomm_megatron.tools.plan.inference import Job, infer  # noqa: E402
from flashcomm_megatron.tools.plan.models import model  # noqa: E402

PAGE = ROOT / "docs" / "planner.md"
RESULTS = ROOT / "benchmarks" / "results"
TENSOR = 8 * 1024 * 8192  # values: 8 prompts of 1024 tokens of a model of 8192 features
CLUSTERS = (("H100", 400.0), ("H100", 25.0), ("L40", 25.0))  # Gbit/s of each GPU's network card
CASES = (("L40", 4), ("L40", 8), ("L20", 8), ("4090", 8), ("A100-PCIe", 8), ("A100", 8), ("H800", 8), ("H100", 8))
CASES += (("H200", 8), ("H20", 8), ("B200", 8), ("MI300X", 2), ("MI300X", 8))


def main() -> None:
    page = PAGE.read_text()
    for name, text in tables().items():
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{text}\n\g<2>", page, count=1, flags=re.S)
    PAGE.write_text(page)
    draw_pays()
    draw_nodes()


def tables() -> dict[str, str]:
    """Every table of the page by its mark."""
    return {"pays": pays(), "published": evidence(), "nodes": across(), "links": links(), "gpus": gpus()}


def pays() -> str:
    """Speed-ups at 4 bits of the recipe with kernels, and of auto as if it had them."""
    rows = []
    for name, tp in CASES:
        job = Job(GPUS[name], link(GPUS[name].link), model("llama-3-70b"), tp, 8, 1024)
        row = [f"{name}, TP{tp}", GPUS[name].link, f"{infer(job, None).communication:.0%}"]
        for recipe in ("flash-v1", "auto"):
            found, start = (
                infer(job, codec(name, recipe)),
                sweep.by_size(job.link, tp, [codec(name, recipe)])[0].pays_from,
            )
            gains = infer(job, None).all_reduce / found.all_reduce, infer(job, None).ttft / found.ttft
            row += [f"{gain:.2f}" for gain in gains] + ["never" if start is None else table.size(start)]
        rows.append(row)
    header = ["", "link", "communication", "flash-v1: all-reduce", "first token", "pays from"]
    return table.markdown([*header, "auto: all-reduce", "first token", "pays from"], rows, left=2)


def codec(name: str, recipe: str) -> Codec:
    return Codec(Config(bits=4, recipe=recipe, min_bytes=0), assumed_speed(GPUS[name]))


def evidence() -> str:
    """Published figures, how far off, and why."""
    found = published.figures()
    out = [each for each in found if each.role == "held out"]
    rows = [
        [
            each.what,
            each.text,
            table.number(each.predict()),
            f"{each.error:+.0%}",
            each.role,
            "" if each.holds else published.MISSES.get(each.what, ""),
        ]
        for each in found
    ]
    summary = (
        f"{sum(each.holds for each in out)} of {len(out)} held-out figures within 20 %; "
        f"{len(found) - len(out)} more were fitted or chosen by."
    )
    header = ["figure", "published", "planner", "off by", "role", "why it is more than 20 % off"]
    return f"{summary}\n\n{table.markdown(header, rows, left=1)}"


def across() -> str:
    """128 MiB over more and more nodes."""
    rows = []
    for (name, rate), count in ((each, count) for each in CLUSTERS for count in (2, 16, 128, 1024)):
        for way in nodes.ways(cluster(name, rate, count), TENSOR, codec(name, "flash-v1")):
            cells = [table.time(way.seconds), table.size(way.card_bytes), table.size(way.workspace)]
            rows.append([f"{8 * count} {name}, {rate:g} Gbit/s", way.name, *cells])
    return table.markdown(["128 MiB, 4 bits", "way", "all-reduce", "sent by a card", "workspace"], rows, left=2)


def cluster(name: str, rate: float, count: int) -> nodes.Cluster:
    return nodes.Cluster(count, 8, link(GPUS[name].link), nodes.card_rate(rate))


def links() -> str:
    rows = [
        [
            name,
            f"{row.rate / GB:.4g}{' a pair' if row.mesh else ''}",
            f"{row.multicast / GB:.3g}" if row.multicast else "",
            f"{row.latency / US:.3g}",
            "; ".join(filter(None, (row.source, row.multicast_source, row.latency_source, row.drain_source))),
        ]
        for name, row in LINKS.items()
    ]
    return table.markdown(["link", "GB/s", "switch adds, GB/s of tensor", "latency, us", "sources"], rows, left=1)


def gpus() -> str:
    rows = [
        [
            name,
            f"{row.peak / 1e12:.4g}",
            f"{row.matmul:.0%}",
            f"{row.memory_rate / GB:.0f}",
            f"{row.memory / GB:.0f}",
            row.link,
            f"{row.source}; products: {row.matmul_source}",
        ]
        for name, row in GPUS.items()
    ]
    header = ["GPU", "TFLOPS, dense bf16", "products reach", "memory, GB/s", "GB", "usual link", "sources"]
    return table.markdown(header, rows, left=1)


def draw_pays() -> None:
    panels = []
    for name, tp in (("L40", 4), ("A100", 8), ("H100", 8)):
        codecs = [Codec(Config(bits=b, recipe="flash-v1", min_bytes=0), assumed_speed(GPUS[name])) for b in (8, 6, 4)]
        lines = sweep.by_size(link(GPUS[name].link), tp, codecs)
        panels.append(plots.Panel(f"{name}, TP{tp}", "bytes of the tensor", "speed-up of the all-reduce", lines))
    plots.draw("Where compression starts to pay, recipe flash-v1", panels, RESULTS / "planner_pays.png")


def draw_nodes() -> None:
    panels = []
    for name, rate in CLUSTERS:
        whole, what = cluster(name, rate, 1024), codec(name, "flash-v1")
        growth, sizes = sweep.by_nodes(whole, TENSOR, what), sweep.by_size_across(whole._replace(nodes=16), what)
        title = f"8 {name} a node, {rate:g} Gbit/s a card"
        panels.append(plots.Panel(f"128 MiB\n{title}", "GPUs", "seconds", growth, None, True))
        panels.append(plots.Panel(f"128 GPUs\n{title}", "bytes of the tensor", "seconds", sizes, None, True))
    plots.draw("One all-reduce over all GPUs, 4 bits", panels, RESULTS / "planner_nodes.png")


if __name__ == "__main__":
    main()
