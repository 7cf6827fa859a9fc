"""How the error of the residual stream grows with depth, and what happens to massive activations: SmolLM2-135M, TP3.

run as:  python benchmarks/bench_depth.py [--model DIR] [--sequences N]

- accuracy_depth: behind every layer, the error of a token's stream over its size, the median of all tokens but the
  first of a window; with residual feedback and without
- accuracy_massive: some first tokens have a feature thousands of times larger than all others, here number 507 (the
  largest of the stream behind layer 11). What each recipe does to it, to the other 575 features of that row, and to
  the rows behind it

Writes both as JSON and CSV, and accuracy_depth.png, to benchmarks/results; accuracy_tables.py puts them on the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import record
import torch
from bench_smollm2 import RANKS, ROOT, TEXT
from torch import Tensor

from flashcomm_megatron.tools.accuracy import sweep
from flashcomm_megatron.tools.accuracy.llama import Llama, Sum, windows
from flashcomm_megatron.tools.accuracy.ranks import Compressed, exact
from flashcomm_megatron.tools.accuracy.score import Method

LENGTH, LAYER = 256, 11  # the layer behind which massive activations are looked at
DEPTHS = {"auto": [4, 3], "flash-v1": [4], "flash-v2": [4]}
MASSIVE = {"auto": [8, 4, 3], "flash-v1": [8, 4], "flash-v2": [4], "mx": [4], "quickreduce": [4], "fp8": [8]}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "smollm2")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--sequences", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Llama(str(options.model))
    text = windows(str(options.model), str(options.text), model, LENGTH, options.sequences)
    reference = streams(model, text, 1, exact)
    depths: list[Row] = []
    massive: list[Row] = [{"recipe": "exact", **looked_at(reference[LAYER], reference[LAYER])}]
    for method in methods(DEPTHS | MASSIVE):
        for has_feedback in (True, False) if method.recipe == "auto" else (False,):
            add = Compressed(method.config, RANKS, {}, has_feedback, codecs=method.legs, layers=model.layers)
            found = streams(model, text, RANKS, add)
            named = {"recipe": method.recipe, "bits": method.config.bits, "feedback": has_feedback}
            print(named, f"{relative(found[-1], reference[-1]):.3f}", flush=True)
            if method.config.bits in DEPTHS.get(method.recipe, ()):
                pairs = zip(found, reference, strict=True)
                depths += [named | {"layer": n, "error": relative(*pair)} for n, pair in enumerate(pairs)]
            if method.config.bits in MASSIVE.get(method.recipe, ()):
                massive.append(named | looked_at(found[LAYER], reference[LAYER]))
    record.save("accuracy_depth", depths)
    record.save("accuracy_massive", massive)
    draw(depths)


def methods(widths: dict[str, list[int]]) -> Iterator[Method]:
    for name, bits in widths.items():
        yield from sweep.methods([name], bits, [RANKS], [None], "auto")


@torch.no_grad()
def streams(model: Llama, text: Tensor, world: int, add: Sum) -> list[Tensor]:
    """The residual stream [windows, tokens, features] behind every layer."""
    stream, found = model.weights["embed_tokens.weight"][text], []

    def noted(site: str, parts: list[Tensor]) -> Tensor:
        nonlocal stream
        total = add(site, parts)
        stream = stream + total
        if site.endswith("mlp.down_proj"):
            found.append(stream)
        return total

    model(text, world, noted)
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    """Error over size of a token's stream, the median over all but the first of a window."""
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1))[:, 1:].median().item()


def looked_at(found: Tensor, wanted: Tensor) -> Row:
    """The massive feature of the first tokens, and what is lost of it, of its row, of the next row, of the others."""
    feature = wanted[:, 0].abs().amax(0).argmax()
    error, first = found - wanted, wanted[:, 0]
    others = torch.arange(wanted.size(-1)) != feature
    rows = error.norm(dim=-1) / wanted.norm(dim=-1)
    return {
        "feature": int(feature),
        "value": found[:, 0, feature].mean().item(),
        "error of the feature": (error[:, 0, feature].abs() / first[:, feature].abs()).mean().item(),
        "error of its row": (error[:, 0, others].norm(dim=-1) / first[:, others].norm(dim=-1)).mean().item(),
        "error of the next row": rows[:, 1].mean().item(),
        "error of the other rows": rows[:, 2:].median().item(),
    }


def draw(rows: Collection[Row]) -> None:
    """A curve for each recipe, width and feedback."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, int, bool], list[Row]] = {}
    for row in rows:
        curves.setdefault((row["recipe"], row["bits"], row["feedback"]), []).append(row)
    figure, axis = plt.subplots(figsize=(8, 4.5))
    colors = {key: f"C{n}" for n, key in enumerate(dict.fromkeys(key[:2] for key in curves))}
    for (recipe, bits, has_feedback), points in curves.items():
        more = (" with feedback" if has_feedback else " without") if recipe == "auto" else ""
        axis.plot(
            [each["layer"] + 1 for each in points], [each["error"] for each in points],
            "o-" if has_feedback else "x--", color=colors[recipe, bits], markersize=4, label=f"{recipe} {bits}{more}",
        )  # fmt: skip
    axis.set(xlabel="layers", ylabel="error of the residual stream over its size", yscale="log", ylim=(0.02, 1))
    axis.set_title("SmolLM2-135M, three ranks")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", ncols=2)
    figure.tight_layout()
    figure.savefig(record.RESULTS / "accuracy_depth.png", dpi=120)


if __name__ == "__main__":
    main()
