"""What recipes, block sizes, feedback and context cost in accuracy, on a real checkpoint.

run as:  python benchmarks/bench_accuracy.py recipes | blocks | speed | feedback | context | sockets
          [--model DIR] [--text FILE]

- recipes: every recipe and width, TP2 and TP8 (python -m flashcomm_megatron accuracy scores one's own model)
- blocks: 4 bits in blocks of 16 to 1024: perplexity, signal to noise by kind of layer, bytes; rows of other models stay
- speed: of the codecs of those blocks, on one core of a quiet machine
- feedback: recipe auto with and without residual feedback, and the loss of each site compressed alone
- context: perplexity by position and agreement along a long generation, up to the model's context
- sockets: 8 and 4 bits with all GPUs on one socket and on two, where a sum is rounded three times instead of twice

With --recipe NAME ... recipes and blocks score only these, other rows stay. Writes CSV, JSON and a plot to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import record
import torch

from flashcomm_megatron.codec.recipes import RECIPES
from flashcomm_megatron.collectives import plan
from flashcomm_megatron.comm import simulated
from flashcomm_megatron.comm.communicator import Gpus
from flashcomm_megatron.comm.simulated import Simulated
from flashcomm_megatron.config import Config
from flashcomm_megatron.tools.accuracy import plot, ranks, sweep
from flashcomm_megatron.tools.accuracy.llama import Llama, windows
from flashcomm_megatron.tools.accuracy.score import Bench, Score

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
BLOCK_RECIPES = ("flash-v1", "auto")
KINDS = ("self_attn.o_proj", "mlp.down_proj")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    PARTS[options.part](options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--model", default=str(DATA / "stories3M"))
    parser.add_argument("--text", default=str(DATA / "tinystories.txt"))
    parser.add_argument("--sequences", type=int, default=46)
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3, 2])
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), help="score these again and keep other rows")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def bench(options: argparse.Namespace, length: int = 192, prompts: int = 4, generated: int = 0) -> Bench:
    model = Llama(options.model)
    text = windows(options.model, options.text, model, length, options.sequences)
    return Bench(model, text, prompts, 16, generated)


def flat(score: Score, **more: Any) -> dict[str, Any]:
    """A score as a row of a table: sites by kind of layer, in the mean."""
    row = {key: value for key, value in asdict(score).items() if not isinstance(value, dict | list)}
    for kind in KINDS:
        of_kind = [value for site, value in score.decibels.items() if site.endswith(kind)]
        row[f"decibels {kind}"] = statistics.fmean(of_kind) if of_kind else None
    return row | more


def saved(part: str) -> list[dict[str, Any]]:
    """The rows of an earlier run."""
    path = record.RESULTS / f"accuracy_{part}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def recipes(options: argparse.Namespace) -> None:
    lab = bench(options, generated=32)
    rows = {(row["recipe"], row["bits"], row["tp"]): row for row in (saved("recipes") if options.recipe else [])}
    for method in sweep.methods(options.recipe or RECIPES, options.bits, options.tp, [None], "auto"):
        score = lab.score(method.config, method.world, with_sites=False)
        show(score)
        rows[score.recipe, score.bits, score.tp] = flat(score)
    record.save("accuracy_recipes", list(rows.values()))
    plot.draw([SimpleNamespace(**row) for row in rows.values()], record.RESULTS / "accuracy_recipes.png")


def blocks(options: argparse.Namespace) -> None:
    name = Path(options.model).name
    rows = {(row["model"], row["recipe"], row["block"], row["tp"]): row for row in saved("blocks")}
    lab = bench(options)
    for recipe, block, world in product(options.recipe or BLOCK_RECIPES, BLOCKS, options.tp):
        score = lab.score(Config(bits=4, recipe=recipe, block=block, min_bytes=0), world, with_sites=False)
        show(score, f"block {block}")
        rows[name, recipe, block, world] = flat(score, model=name)
    record.save("accuracy_blocks", list(rows.values()))
    draw_blocks(rows.values())


def speed(options: argparse.Namespace) -> None:
    rows = [
        {"recipe": recipe, "block": block, **gigabytes(Config(bits=4, recipe=recipe, block=block))}
        for recipe, block in product(BLOCK_RECIPES, BLOCKS)
    ]
    record.save("accuracy_speed", rows)
    for row in rows:
        print(row)


def feedback(options: argparse.Namespace) -> None:
    lab, rows = bench(options), []
    for world in options.tp:
        for bits in options.bits:
            for has_feedback in (True, False):
                score = lab.score(Config(bits=bits, min_bytes=0), world, bits == 4 and not has_feedback, has_feedback)
                show(score, "feedback" if has_feedback else "no feedback")
                rows.append(flat(score, feedback=has_feedback, rise_by_site=str(score.rise_by_site or "")))
    record.save("accuracy_feedback", rows)


def context(options: argparse.Namespace) -> None:
    """Stories one after the other, so that every window is as long as the model's context."""
    joined = Path(options.text).read_text().replace("<|endoftext|>", "\n")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(joined)
        file.flush()
        options.text = file.name
        length = Llama(options.model).context
        lab = bench(options, length, prompts=min(4, options.sequences), generated=length - 16)
    rows = []
    for recipe in ("auto", "flash-v1"):
        for world in options.tp:
            score = lab.score(Config(bits=4, recipe=recipe, min_bytes=0), world, with_sites=False)
            show(score, f"{score.rise_by_quarter} {score.agreement_by_quarter}")
            quarters = enumerate(zip(score.rise_by_quarter, score.agreement_by_quarter, strict=True), 1)
            by_quarter = {
                f"{what} {i}": pair[j] for i, pair in quarters for j, what in enumerate(("rise", "agreement"))
            }
            rows.append(flat(score, **by_quarter))
    record.save("accuracy_context", rows)


def sockets(options: argparse.Namespace) -> None:
    lab, rows = bench(options), []
    for world, bits, count in product((4, 8), (8, 4), (1, 2)):
        with on_sockets(count):
            score = lab.score(Config(bits=bits, min_bytes=0), world, with_sites=False)
        show(score, f"{count} sockets")
        rows.append(flat(score, sockets=count) | {"wire_bits": None})
    record.save("accuracy_sockets", rows)


@contextmanager
def on_sockets(count: int) -> Iterator[None]:
    """The lab's ranks are GPUs without NVLink, divided among ``count`` sockets, and tensors of any size heed it."""

    class Placed(Simulated):
        def __init__(self, rank: int, world: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(rank, world, *args, **kwargs)
            self._kind, self.gpus = "cuda", Gpus(tuple(each * count // world for each in range(world)))

    with ExitStack() as patches:
        for module in (ranks, simulated):
            patches.enter_context(mock.patch.object(module, "Simulated", Placed))
        patches.enter_context(mock.patch.object(plan, "SOCKETS_BYTES", 0))
        yield


def gigabytes(config: Config, numel: int = 1 << 20) -> dict[str, float]:
    """GB/s of a bfloat16 tensor through encode and decode of the reduce leg, best of several, on one core."""
    codec, x = config.legs.reduce, torch.randn(numel).bfloat16()
    payload, out = codec.encode(x), torch.empty_like(x)
    return {
        "encode GB/s": x.nbytes / best(lambda: codec.encode(x, payload)) / 1e9,
        "decode GB/s": x.nbytes / best(lambda: codec.decode_sum([payload], out)) / 1e9,
    }


def best(call: Callable[[], Any], repeats: int = 7) -> float:
    """Seconds of this thread, whatever else the machine does."""
    times = []
    for _ in range(repeats):
        started = time.thread_time()
        call()
        times.append(time.thread_time() - started)
    return min(times)


def draw_blocks(rows: Collection[dict[str, Any]]) -> None:
    """A row of panels for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(len(models), 2, figsize=(11, 4.2 * len(models)), squeeze=False)
    for model, (left, right) in zip(models, panels, strict=True):
        curves: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in rows:
            if row["model"] == model:
                curves.setdefault((row["recipe"], row["tp"]), []).append(row)
        for (recipe, world), points in curves.items():
            label = f"{recipe}, TP{world}"
            left.plot([each["block"] for each in points], [each["rise"] for each in points], "o-", label=label)
            right.plot([each["wire_bits"] for each in points], [each["rise"] for each in points], "o-", label=label)
        left.set(
            xscale="log", xlabel="values in a block", ylabel="relative rise of perplexity", title=f"{model}, 4 bits"
        )
        left.set_xticks(BLOCKS, [str(each) for each in BLOCKS])
        right.set(xlabel="bits per value on the wire", title="the same, by what it costs")
        for axis in (left, right):
            axis.set(yscale="log")
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(record.RESULTS / "accuracy_blocks.png", dpi=120)


def show(score: Score, what: str = "") -> None:
    print(f"{score.recipe} {score.bits} TP{score.tp} {what}: {score.wire_bits:.3f} bits, {score.rise:.3%}", flush=True)


PARTS = {
    "recipes": recipes,
    "blocks": blocks,
    "speed": speed,
    "feedback": feedback,
    "context": context,
    "sockets": sockets,
}


if __name__ == "__main__":
    main()
