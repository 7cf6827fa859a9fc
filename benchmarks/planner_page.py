"""Put the planner's tables into docs/planner.md, between marks like ``<!-- pays -->`` and ``<!-- end -->``.

run as:  python benchmarks/planner_page.py        (seconds; projections, nothing is measured)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import planner_published as published  # noqa: E402

from flashcomm_megatron.config import Config  # noqa: E402
from flashcomm_megatron.tools.plan import cluster, printing  # noqa: E402
from flashcomm_megatron.tools.plan.cost import Compression, on_gpu  # noqa: E402
from flashcomm_megatron.tools.plan.hardware import GPUS, link  # noqa: E402
from flashcomm_megatron.tools.plan.models import model  # noqa: E402
from flashcomm_megatron.tools.plan.serving import Job, times  # noqa: E402
from flashcomm_megatron.tools.plan.tables import by_size  # noqa: E402

PAGE = ROOT / "docs" / "planner.md"
TENSOR = 8 * 1024 * 8192  # values: 8 prompts of 1024 tokens of a model of 8192 features
CLUSTERS = (("H100", 400.0), ("H100", 25.0), ("L40", 25.0))  # Gbit/s of each GPU's network card
CASES = (("L40", 4), ("L40", 8), ("L20", 8), ("4090", 8), ("A100-PCIe", 8), ("A100", 8), ("H800", 8), ("H100", 8))
CASES += (("H200", 8), ("H20", 8), ("B200", 8), ("MI300X", 2), ("MI300X", 8))


def main() -> None:
    page = PAGE.read_text()
    for name, text in {"pays": pays(), "published": evidence(), "nodes": across()}.items():
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{text}\n\g<2>", page, count=1, flags=re.S)
    PAGE.write_text(page)


def pays() -> str:
    """Speed-ups at 4 bits of two recipes that have kernels."""
    rows = []
    for name, tp in CASES:
        job = Job(GPUS[name], link(GPUS[name].link), model("llama-3-70b"), tp, 8, 1024)
        exact = times(job, None)
        row = [f"{name}, TP{tp}", GPUS[name].link, f"{exact.communication:.0%}"]
        for recipe in ("flash-v1", "auto"):
            found = times(job, four_bits(name, recipe))
            [curve] = by_size(job.link, tp, [four_bits(name, recipe)])
            row += [f"{exact.all_reduce / found.all_reduce:.2f}", f"{exact.ttft / found.ttft:.2f}"]
            row.append("never" if curve.pays_from is None else printing.size(curve.pays_from))
        rows.append(row)
    header = ["", "link", "communication", "flash-v1: all-reduce", "first token", "pays from"]
    return markdown([*header, "auto: all-reduce", "first token", "pays from"], rows, left=2)


def four_bits(name: str, recipe: str) -> Compression:
    return on_gpu(Config(bits=4, recipe=recipe, min_bytes=0), GPUS[name])


def evidence() -> str:
    """Published figures, how far off, and why."""
    out = [each for each in published.figures() if each.role == "held out"]
    others = len(published.figures()) - len(out)
    holds = sum(each.holds for each in out)
    summary = f"{holds} of {len(out)} held-out figures within 20 %; {others} more were fitted or chosen by."
    return f"{summary}\n\n{markdown(published.HEADER, published.rows(), left=1)}"


def across() -> str:
    """128 MiB over more and more nodes."""
    rows = []
    for (name, rate), count in ((each, count) for each in CLUSTERS for count in (2, 16, 128, 1024)):
        whole = cluster.Cluster(count, 8, link(GPUS[name].link), cluster.card_rate(rate))
        for way in cluster.ways(whole, TENSOR, four_bits(name, "flash-v1")):
            cells = [printing.time(way.seconds), printing.size(way.card_bytes), printing.size(way.workspace)]
            rows.append([f"{8 * count} {name}, {rate:g} Gbit/s", way.name, *cells])
    return markdown(["128 MiB, 4 bits", "way", "all-reduce", "sent by a card", "workspace"], rows, left=2)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    rule = ["---" if i < left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(header), rule, *map(list, rows)))


if __name__ == "__main__":
    main()
