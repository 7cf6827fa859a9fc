"""What plan prints: one function for each kind of question, as text and as what --json prints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ...config import Config
from . import PROJECTION, cluster, measured
from .cost import Collective, Compression, on_cpu, on_gpu, seconds, sent_bytes
from .hardware import GB, Link, gpu, link
from .models import model
from .printing import Curve, Panel, aligned, draw, size, time
from .serving import Job, Times, times

Row = dict[str, Any]
FUSED = ("auto", "flash-v1", "flash-v2")  # recipes whose codecs have fused kernels
SIZES = tuple(2**power for power in range(14, 31))  # 16 KiB to 1 GiB
SEQUENCES = tuple(2**power for power in range(5, 15))


class Printed(NamedTuple):
    """As text and as what --json prints."""

    text: str
    data: Row


def table(options: Namespace) -> Printed:
    """What the options ask for; ValueError with a sentence if that cannot be."""
    if options.gpu is None:
        return _on_a_measured_link(options)
    job, compressions, heading = _setup(options)
    if options.nodes is not None:
        return _nodes(options, job, compressions[-1], heading)
    return _sweep(options, job, compressions, heading) if options.sweep else _serving(job, compressions, heading)


def _setup(options: Namespace) -> tuple[Job, list[Compression], list[str]]:
    row = gpu(options.gpu)
    wires = link(options.link or row.link)
    if options.link_rate is not None:
        wires = replace(wires, rate=options.link_rate, source="--link-rate", step=options.latency)
        wires = replace(wires, mesh=False, multicast=None)
    job = Job(row, wires, model(options.model), options.tp, options.batch, options.seq)
    if job.tp == 1:
        raise ValueError("--tp 1: one GPU sends nothing, so there is nothing to compress.")
    if job.model.heads % job.tp:
        raise ValueError(
            f"--tp {job.tp}: {job.model.name} has {job.model.heads} attention heads, which {job.tp} GPUs cannot share "
            f"evenly. Choose a divisor of {job.model.heads}."
        )
    compressions = [on_gpu(config, row, wires.nvlink) for config in _configs(options)]
    if check := options.gpu_check or measured.find_gpu_check(options.gpu):
        compressions = [replace(each, speed=measured.gpu_check(check, each.config.bits)) for each in compressions]
    heading = [
        f"{options.gpu}, TP{options.tp}, {job.model.name}, {options.batch} x {options.seq} tokens, "
        f"recipe {options.recipe}: {PROJECTION}",
        f"link: {wires.rate / GB:.4g} GB/s {'between two GPUs' if wires.mesh else 'from each GPU'} ({wires.source})",
        f"codec: {f'measured, {check}' if check else 'assumed, 80 % of memory bandwidth, in fused kernels'}",
    ]
    if options.recipe not in FUSED:
        heading.append("no fused kernel of this recipe's codecs exists yet: on a GPU PyTorch runs them, more slowly")
    if job.memory > row.memory:
        needed, there = (f"{nbytes / GB:.0f} GB" for nbytes in (job.memory, row.memory))
        heading.append(f"does not fit: {needed} of weights and cache a GPU, {there} there")
    return job, compressions, heading


def _configs(options: Namespace) -> list[Config]:
    given = {name: getattr(options, name) for name in ("recipe", "block", "algorithm", "min_bytes")}
    return [Config(bits=bits, **given) for bits in options.bits]


def _always(compression: Compression) -> Compression:
    """The same, for tensors of any size."""
    return replace(compression, config=replace(compression.config, min_bytes=0))


# ---- one node ------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bits": ("bits", str),
    "sent": ("sent by a GPU", size),
    "all_reduce_seconds": ("all-reduce", time),
    "all_reduce_speed_up": ("speed-up", "{:.2f}".format),
    "ttft_seconds": ("first token", time),
    "ttft_speed_up": ("speed-up", "{:.2f}".format),
    "step_seconds": ("step", time),
    "step_speed_up": ("speed-up", "{:.2f}".format),
    "communication": ("communication", "{:.0%}".format),
    "tokens_per_second": ("tokens/s", "{:.0f}".format),
    "tokens_speed_up": ("speed-up", "{:.2f}".format),
    "training_seconds": ("training step", time),
    "training_speed_up": ("speed-up", "{:.2f}".format),
}


def _serving(job: Job, compressions: Sequence[Compression], heading: list[str]) -> Printed:
    prompt, token = job.sums(job.seq), job.sums(1)
    exact = times(job, None)
    rows = [_row(job, each, times(job, each), exact) for each in (None, *compressions)]
    notes = [
        f"{what}: {size(each.nbytes)} stay exact ({reason}; --min-bytes 0 plans them compressed)"
        for what, each in (("prefill", prompt), ("decoding", token))
        if (reason := compressions[0].deferred(each))
    ]
    text = "\n".join([*heading, "", _tabulate(rows), *notes])
    return Printed(text, {"projection": PROJECTION, "setup": heading, "rows": rows, "notes": notes})


def _row(job: Job, compression: Compression | None, found: Times, exact: Times) -> Row:
    return {
        "bits": 16 if compression is None else compression.config.bits,
        "sent": sent_bytes(job.sums(job.seq), compression),
        "all_reduce_seconds": found.all_reduce,
        "all_reduce_speed_up": exact.all_reduce / found.all_reduce,
        "ttft_seconds": found.ttft,
        "ttft_speed_up": exact.ttft / found.ttft,
        "communication": found.communication,
        "tokens_per_second": job.batch / found.token,
        "tokens_speed_up": exact.token / found.token,
        "training_seconds": found.training,
        "training_speed_up": exact.training / found.training,
    }


def _tabulate(rows: list[Row]) -> str:
    names = list(rows[0])
    return aligned(
        [COLUMNS[name][0] for name in names], [[COLUMNS[name][1](row[name]) for name in names] for row in rows]
    )


def _on_a_measured_link(options: Namespace) -> Printed:
    """One step of a model over a measured link, by CPUs."""
    lab = measured.lab(options.measured) if options.measured else _given(options)
    shape = model(options.model)
    sums = Collective("all_reduce", options.batch * options.seq * shape.hidden, options.tp, shape.sums)
    one = sums._replace(times=1)
    exact, rows = seconds(lab.link, sums, None), []
    for each in (None, *(on_cpu(config, lab.encode, lab.decode) for config in _configs(options))):
        taken = seconds(lab.link, sums, each)
        step = lab.compute_seconds + taken
        row: Row = {"bits": 16 if each is None else each.config.bits, "sent": sent_bytes(one, each)}
        row |= {"all_reduce_seconds": taken / sums.times, "all_reduce_speed_up": exact / taken, "step_seconds": step}
        row |= {"step_speed_up": (lab.compute_seconds + exact) / step, "communication": 1 - lab.compute_seconds / step}
        rows.append(row)
    heading = (
        f"{shape.name}, TP{options.tp}, {options.batch} x {options.seq} tokens, "
        f"{lab.link.rate * 8 / 1e9:g} Gbit/s a rank, {time(lab.compute_seconds)} of compute: "
        "projection from measured link, codec and compute"
    )
    return Printed(f"{heading}\n\n{_tabulate(rows)}", {"projection": heading, "rows": rows})


def _given(options: Namespace) -> measured.Lab:
    needed = {"--link-rate": options.link_rate, "--compute-seconds": options.compute_seconds}
    missing = [name for name, value in {**needed, "--codec-speed": options.codec_speed}.items() if value is None]
    if missing:
        raise ValueError(f"name a --gpu, or describe what was measured: {', '.join(missing)} missing.")
    wires = measured.link(options.link_rate, options.latency, "--link-rate")
    return measured.Lab(wires, options.compute_seconds, *options.codec_speed)


# ---- where it starts to pay ----------------------------------------------------------------------------------------


def _sweep(options: Namespace, job: Job, compressions: Iterable[Compression], heading: list[str]) -> Printed:
    """Everything compressed, whatever its size, so that the minimum size can be judged."""
    always = [_always(each) for each in compressions]
    sizes, sequences = by_size(job.link, job.tp, always), _by_sequence(job, always[-1])
    bits = always[-1].config.bits
    panels = [
        Panel(f"all-reduce, TP{job.tp}", "bytes of the tensor", "speed-up over exact", sizes),
        Panel(f"time to first token, {bits} bits", "tokens of each prompt", "speed-up over exact", sequences),
    ]
    draw(heading[0].removesuffix(f": {PROJECTION}"), panels, options.out)
    rows = [[size(nbytes), *(f"{curve.y[i]:.2f}" for curve in sizes)] for i, nbytes in enumerate(SIZES)]
    starts = [f"{c.name}: {'never' if c.pays_from is None else f'from {size(c.pays_from)}'}" for c in sizes]
    header = ["tensor", *(curve.name for curve in sizes)]
    text = ["", "speed-up of the all-reduce, everything compressed", aligned(header, rows), "pays", *starts]
    data = {name: [each._asdict() for each in curves] for name, curves in (("sizes", sizes), ("sequences", sequences))}
    heads = {"projection": PROJECTION, "setup": heading}
    return Printed("\n".join([*heading, *text, f"wrote {options.out}"]), heads | data)


def by_size(wires: Link, world: int, compressions: Iterable[Compression]) -> list[Curve]:
    """Speed-up of an all-reduce by bytes of the tensor, a curve for each compression."""
    sums = [Collective("all_reduce", nbytes // 2, world) for nbytes in SIZES]
    return [
        Curve(f"{c.config.bits} bits", SIZES, [seconds(wires, s, None) / seconds(wires, s, c) for s in sums])
        for c in compressions
    ]


def _by_sequence(job: Job, compression: Compression) -> list[Curve]:
    """Speed-up of the first token by tokens of each prompt, a curve for each number of GPUs."""
    curves = []
    for tp in (2, 4, 8):
        jobs = [job._replace(tp=tp, seq=seq) for seq in SEQUENCES]
        curves.append(Curve(f"TP{tp}", SEQUENCES, [times(j, None).ttft / times(j, compression).ttft for j in jobs]))
    return curves


# ---- several nodes -------------------------------------------------------------------------------------------------


def _nodes(options: Namespace, job: Job, compression: Compression, heading: list[str]) -> Printed:
    """One all-reduce of the prompt's activations over all GPUs of 1, 2, 4 ... nodes, at the last width."""
    always, numel = _always(compression), job.batch * job.seq * job.model.hidden
    whole = cluster.Cluster(options.nodes, job.tp, job.link, cluster.card_rate(options.rate))
    counts = [2**power for power in range(options.nodes.bit_length()) if 2**power < options.nodes] + [options.nodes]
    found = {count: cluster.ways(whole._replace(nodes=count), numel, always) for count in counts}
    rows: list[Row] = []
    for count, all_ways in found.items():
        fastest = min(all_ways, key=lambda way: way.seconds)
        rows += [{"nodes": count, "gpus": count * job.tp, **w._asdict(), "fastest": w is fastest} for w in all_ways]
    what = f"one all-reduce of {size(2 * numel)}, {always.config.bits} bits, {options.rate:g} Gbit/s a GPU"
    lines = [*heading, f"{what} between nodes; {PROJECTION}", "", _tabulate_nodes(rows)]
    lines.append(f"fused kernels inside a node: {size(job.tp * cluster.FUSED_INBOXES)} of inboxes a GPU")
    if options.sweep:
        _draw_nodes(options, whole, numel, always, found, what)
        lines.append(f"wrote {options.out}")
    return Printed("\n".join(lines), {"projection": PROJECTION, "setup": heading, "rows": rows})


def _tabulate_nodes(rows: list[Row]) -> str:
    header = ["way", "nodes", "GPUs", "all-reduce", "sent by a card", "workspace", ""]
    cells = [
        [row["name"], str(row["nodes"]), str(row["gpus"]), time(row["seconds"]), size(row["card_bytes"]),
         size(row["workspace"]), "fastest" if row["fastest"] else ""]
        for row in rows
    ]  # fmt: skip
    return aligned(header, cells, left=1)


def _draw_nodes(
    options: Namespace, whole: cluster.Cluster, numel: int, compression: Compression,
    by_count: dict[int, list[cluster.Way]], what: str,
) -> None:  # fmt: skip
    """Seconds of every way, by nodes and by the tensor's size."""
    several = {count * whole.gpus: ways for count, ways in by_count.items() if count > 1}
    by_bytes = {nbytes: cluster.ways(whole, nbytes // 2, compression) for nbytes in SIZES}
    panels = [
        Panel(title, x, "seconds", [
            Curve(way.name, list(found), [ways[i].seconds for ways in found.values()])
            for i, way in enumerate(next(iter(found.values()), []))
        ])
        for title, x, found in (
            (f"all-reduce of {size(2 * numel)}", "GPUs", several),
            (f"{whole.world} GPUs", "bytes of the tensor", by_bytes),
        )
    ]  # fmt: skip
    draw(f"{options.gpu}, {whole.gpus} GPUs a node, {what}", panels, options.out)
