"""The answers of plan, one function for each kind of question: tables, what --json prints, figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from ...comm.workspace import FUSED
from ...config import Config
from . import PROJECTION, measured, nodes, plots, published, sweep, table
from .cost import Codec, Computing, Message, Speed, assumed_speed, plan_of, predict, seconds, wire_bytes
from .hardware import GB, Link, gpu, link
from .inference import Inference, Job, infer, messages
from .models import model

Row = dict[str, Any]


class Answer(NamedTuple):
    """As text and as what --json prints."""

    text: str
    data: dict[str, Any]


def answer(options: argparse.Namespace) -> Answer:
    """What the options ask for; ValueError with a sentence if that cannot be."""
    if options.published:
        return _published()
    if options.gpu is None:
        return _measured(options)
    job, codecs, heading = _setup(options)
    if options.nodes is not None:
        return _nodes(options, job, codecs, heading)
    return _sweep(options, job, codecs, heading) if options.sweep else _plan(job, codecs, heading)


# ---- what is given -------------------------------------------------------------------------------------------------


def _setup(options: argparse.Namespace) -> tuple[Job, list[Codec], list[str]]:
    row = gpu(options.gpu)
    wires = link(options.link or row.link)
    if options.link_rate is not None:
        wires = replace(wires, rate=options.link_rate, source="--link-rate", step=options.latency)
        wires = replace(wires, mesh=False, multicast=None, multicast_source="")
    job = Job(row, wires, model(options.model), options.tp, options.batch, options.seq)
    if job.model.heads % job.tp:
        raise ValueError(
            f"--tp {job.tp}: {job.model.name} has {job.model.heads} attention heads, which {job.tp} GPUs cannot share "
            f"evenly. Choose a divisor of {job.model.heads}."
        )
    check = options.gpu_check or measured.find_gpu_check(options.gpu)
    speeds: list[Speed] = [measured.gpu_check(check, bits) if check else assumed_speed(row) for bits in options.bits]
    codecs = [Codec(config, speed) for config, speed in zip(_configs(options), speeds, strict=True)]
    each = "between two GPUs" if wires.mesh else "from each GPU"
    heading = [
        f"{options.gpu}, TP{options.tp}, {job.model.name}, {options.batch} x {options.seq} tokens, "
        f"recipe {options.recipe}: {PROJECTION}",
        f"link: {wires.rate / GB:.4g} GB/s {each} ({wires.source})",
        f"codec: {f'measured, {check}' if check else 'assumed, 80 % of memory bandwidth, in fused kernels'}",
    ]
    if not all(fused(each) for each in codecs[0].config.legs):
        heading.append("no fused kernel of this recipe's codecs exists yet: on a GPU PyTorch runs them, more slowly")
    if job.memory > row.memory:
        heading.append(
            f"does not fit: {job.memory / GB:.0f} GB of weights and cache a GPU, {row.memory / GB:.0f} GB there"
        )
    return job, codecs, heading


def fused(codec: Any) -> bool:
    """Whether fused kernels know this number format."""
    native = getattr(codec, "native", None)
    return native is not None and native[0] in FUSED


def _configs(options: argparse.Namespace) -> list[Config]:
    given = {name: getattr(options, name) for name in ("recipe", "block", "algorithm", "min_bytes")}
    return [Config(bits=bits, **given) for bits in options.bits]


# ---- one node ------------------------------------------------------------------------------------------------------


def _plan(job: Job, codecs: list[Codec], heading: list[str]) -> Answer:
    message, small = (messages(job, tokens) for tokens in (job.seq, 1))
    if not message:
        raise ValueError("--tp 1: one GPU sends nothing, so there is nothing to compress.")
    exact = infer(job, None)
    rows = [_row(job, message[0], codec, exact) for codec in (None, *codecs)]
    notes = [
        f"{what}: {table.size(each.nbytes)} stay exact ({plan.deferred})"
        for what, each in (("prefill", message[0]), ("decoding", small[0]))
        if (plan := plan_of(each, codecs[0])).deferred is not None
    ]
    text = "\n".join([*heading, "", _tabulate(rows), *notes])
    return Answer(text, {"projection": PROJECTION, "setup": heading, "rows": rows, "notes": notes})


def _row(job: Job, message: Message, codec: Codec | None, exact: Inference) -> Row:
    found = infer(job, codec)
    return {
        "bits": 16 if codec is None else codec.config.bits,
        "sent": _sent(message, codec),
        "all_reduce_seconds": found.all_reduce,
        "all_reduce_speed_up": exact.all_reduce / found.all_reduce,
        "ttft_seconds": found.ttft,
        "ttft_speed_up": exact.ttft / found.ttft,
        "communication": found.communication,
        "tokens_per_second": job.batch / found.token,
        "tokens_speed_up": exact.token / found.token,
    }


def _sent(message: Message, codec: Codec | None) -> int:
    plan = plan_of(message, codec or Codec(Config(bits=8, min_bytes=0), Computing(1, 1)))
    return plan.exact_bytes if codec is None or plan.deferred is not None else wire_bytes(message, plan)


FORMATS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bits": ("bits", str),
    "sent": ("sent by a GPU", table.size),
    "all_reduce_seconds": ("all-reduce", table.time),
    "all_reduce_speed_up": ("speed-up", "{:.2f}".format),
    "ttft_seconds": ("first token", table.time),
    "ttft_speed_up": ("speed-up", "{:.2f}".format),
    "step_seconds": ("step", table.time),
    "step_speed_up": ("speed-up", "{:.2f}".format),
    "communication": ("communication", "{:.0%}".format),
    "tokens_per_second": ("tokens/s", "{:.0f}".format),
    "tokens_speed_up": ("speed-up", "{:.2f}".format),
}


def _tabulate(rows: list[Row]) -> str:
    names = list(rows[0])
    cells = [[FORMATS[name][1](row[name]) for name in names] for row in rows]
    return table.aligned([FORMATS[name][0] for name in names], cells)


def _sweep(options: argparse.Namespace, job: Job, codecs: list[Codec], heading: list[str]) -> Answer:
    """Compression of everything, whatever the policy says, so that its thresholds can be judged."""
    always = [_always(codec) for codec in codecs]
    sizes, sequences = sweep.by_size(job.link, job.tp, always), sweep.by_sequence(job, always[-1])
    bits = always[-1].config.bits
    panels = [
        plots.Panel(f"all-reduce, TP{job.tp}", "bytes of the tensor", "speed-up over exact", sizes),
        plots.Panel(f"time to first token, {bits} bits", "tokens of each prompt", "speed-up over exact", sequences),
    ]
    plots.draw(heading[0].removesuffix(f": {PROJECTION}"), panels, options.out)
    header = ["tensor", *(line.name for line in sizes)]
    rows = [[table.size(nbytes), *(f"{line.y[i]:.2f}" for line in sizes)] for i, nbytes in enumerate(sweep.SIZES)]
    starts = [f"{line.name}: {_from(line)}" for line in sizes]
    text = ["", "speed-up of the all-reduce, everything compressed", table.aligned(header, rows), "pays", *starts]
    data = {"projection": PROJECTION, "setup": heading, "sizes": _lines(sizes), "sequences": _lines(sequences)}
    return Answer("\n".join([*heading, *text, f"wrote {options.out}"]), data)


def _always(codec: Codec) -> Codec:
    return replace(codec, config=replace(codec.config, min_bytes=0))


def _from(line: sweep.Line) -> str:
    return "never" if line.pays_from is None else f"from {table.size(line.pays_from)}"


def _lines(lines: list[sweep.Line]) -> list[Row]:
    return [{"name": line.name, "x": list(line.x), "y": line.y} for line in lines]


# ---- many nodes ----------------------------------------------------------------------------------------------------


def _nodes(options: argparse.Namespace, job: Job, codecs: list[Codec], heading: list[str]) -> Answer:
    """One all-reduce of the prompt's activations over all GPUs of 1, 2, 4 ... nodes, at the last width."""
    codec = _always(codecs[-1])
    numel = job.batch * job.seq * job.model.hidden
    cluster = nodes.Cluster(options.nodes, job.tp, job.link, nodes.card_rate(options.rate))
    rows: list[Row] = []
    for count in sweep.doublings(options.nodes):
        found = nodes.ways(cluster._replace(nodes=count), numel, codec)
        fastest = min(found, key=lambda way: way.seconds)
        rows += [{"nodes": count, "gpus": count * job.tp, **way._asdict(), "fastest": way is fastest} for way in found]
    what = f"one all-reduce of {table.size(2 * numel)}, {codec.config.bits} bits, {options.rate:g} Gbit/s a GPU"
    lines = [*heading, f"{what} between nodes; {PROJECTION}", "", _tabulate_nodes(rows)]
    lines.append(f"fused kernels inside a node: {table.size(nodes.fused_workspace(job.tp))} of inboxes a GPU")
    if options.sweep:
        growth, sizes = sweep.by_nodes(cluster, numel, codec), sweep.by_size_across(cluster, codec)
        panels = [
            plots.Panel(f"all-reduce of {table.size(2 * numel)}", "GPUs", "seconds", growth, None, True),
            plots.Panel(f"{cluster.world} GPUs", "bytes of the tensor", "seconds", sizes, None, True),
        ]
        plots.draw(f"{options.gpu}, {job.tp} GPUs a node, {what}", panels, options.out)
        lines.append(f"wrote {options.out}")
    return Answer("\n".join(lines), {"projection": PROJECTION, "setup": heading, "rows": rows})


def _tabulate_nodes(rows: list[Row]) -> str:
    header = ["way", "nodes", "GPUs", "all-reduce", "sent by a card", "workspace", ""]
    cells = [
        [
            row["name"],
            str(row["nodes"]),
            str(row["gpus"]),
            table.time(row["seconds"]),
            table.size(row["card_bytes"]),
            table.size(row["workspace"]),
            "fastest" if row["fastest"] else "",
        ]
        for row in rows
    ]
    return table.aligned(header, cells, left=1)


# ---- a measured link, and the evidence -----------------------------------------------------------------------------


def _measured(options: argparse.Namespace) -> Answer:
    lab = measured.lab(options.measured) if options.measured else _given(options)
    shape = model(options.model)
    numel = options.batch * options.seq * shape.hidden
    message = Message("all_reduce", numel, options.tp, shape.sums)
    rows, exact = [], predict(lab.link, lab.compute_seconds, [message])
    for codec in (None, *(Codec(config, lab.speed, "cpu") for config in _configs(options))):
        one, step = seconds(lab.link, message, codec), predict(lab.link, lab.compute_seconds, [message], codec)
        row: Row = {"bits": 16 if codec is None else codec.config.bits, "sent": _sent(message, codec)}
        gain = seconds(lab.link, message, None) / one
        row |= {"all_reduce_seconds": one, "all_reduce_speed_up": gain, "step_seconds": step}
        rows.append(row | {"step_speed_up": exact / step, "communication": 1 - lab.compute_seconds / step})
    heading = (
        f"{shape.name}, TP{options.tp}, {options.batch} x {options.seq} tokens, "
        f"{lab.link.rate * 8 / 1e9:g} Gbit/s a rank, {table.time(lab.compute_seconds)} of compute: "
        "projection from measured link, codec and compute"
    )
    return Answer(f"{heading}\n\n{_tabulate(rows)}", {"projection": heading, "rows": rows})


def _given(options: argparse.Namespace) -> measured.Lab:
    needed = {"--link-rate": options.link_rate, "--compute-seconds": options.compute_seconds}
    missing = [name for name, value in {**needed, "--codec-speed": options.codec_speed}.items() if value is None]
    if missing:
        raise ValueError(f"name a --gpu, or describe what was measured: {', '.join(missing)} missing.")
    wires: Link = measured.link(options.link_rate, options.latency, "--link-rate")
    return measured.Lab(wires, options.compute_seconds, options.codec_speed)


def _published() -> Answer:
    rows = [
        [
            f.what,
            f.text,
            table.number(f.predict()),
            f"{f.error:+.0%}",
            f.role,
            "" if f.holds else published.MISSES.get(f.what, "?"),
        ]
        for f in published.figures()
    ]
    header = ["figure", "published", "planner", "off by", "", "why it misses 20 %"]
    data = [dict(zip(("figure", "published", "planner", "error", "role", "why"), row, strict=True)) for row in rows]
    text = f"planner: {PROJECTION}\n\n{table.aligned(header, rows, left=1)}"
    return Answer(text, {"projection": PROJECTION, "rows": data})
