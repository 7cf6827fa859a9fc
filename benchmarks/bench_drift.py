"""Does noise accumulate in text that a compressed model writes itself? With and without residual feedback.

run as:  python benchmarks/bench_drift.py [--model DIR] [--text FILE] [--prompts 8]

Each variant writes on from the same prompts up to the model's whole context, on its own path, with the same random
numbers. Then the exact model reads what was written. By quarter of the text: perplexity of it under the exact model
(of its own text, the exact model's is what there is to compare with), the share of 4-grams that the same text held
before, and after how many tokens the text leaves the exact model's. Writes CSV, JSON and a plot to benchmarks/results.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flashcomm_megatron.config import Config
from flashcomm_megatron.tools.accuracy.llama import Cache, Llama, Sum, windows
from flashcomm_megatron.tools.accuracy.ranks import Compressed, exact

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PROMPT = 16
QUARTERS = 4
GRAM = 4  # tokens that repeat together

# name: configuration, ranks, feedback
VARIANTS: dict[str, tuple[Config, int, bool] | None] = {
    "exact": None,
    "auto TP2": (Config(4), 2, True),
    "auto TP2, no feedback": (Config(4), 2, False),
    "auto TP8": (Config(4), 8, True),
    "auto TP8, no feedback": (Config(4), 8, False),
    "flash-v1 TP2": (Config(4, recipe="flash-v1"), 2, False),
}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    model = Llama(options.model)
    prompts = windows(options.model, options.text, model, PROMPT, options.prompts)
    steps = model.context - PROMPT
    noise = torch.rand(steps, options.prompts, 1, generator=torch.Generator().manual_seed(0))
    texts = {name: write(model, prompts, noise, variant) for name, variant in VARIANTS.items()}
    rows = [row(name, model, text, texts["exact"]) for name, text in texts.items()]
    record.save("accuracy_drift", rows)
    plot(rows)
    for each in rows:
        print(each)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DATA / "stories3M"))
    parser.add_argument("--text", default=str(DATA / "tinystories.txt"))
    parser.add_argument("--prompts", type=int, default=8)
    return parser.parse_args()


@torch.no_grad()
def write(model: Llama, prompts: Tensor, noise: Tensor, variant: tuple[Config, int, bool] | None) -> Tensor:
    """Prompts and what follows [prompts, context]; ``noise`` [steps, prompts, 1] chooses each token."""
    config, world, has_feedback = variant or (None, 1, False)
    add: Sum = exact if config is None else Compressed(config, world, {}, has_feedback)
    cache: Cache = {}
    text = tokens = prompts
    for step in noise:
        if isinstance(add, Compressed):
            add.begin()
        chances = model(tokens, world, add, cache)[:, -1].softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(chances, step.clamp(max=1 - 1e-6)).clamp(max=chances.size(1) - 1)
        text = torch.cat([text, tokens], 1)
    return text


@torch.no_grad()
def row(name: str, model: Llama, text: Tensor, reference: Tensor) -> dict[str, Any]:
    """What there is to know of one variant's text."""
    logits = model(text, 1, exact)[:, PROMPT - 1 : -1]
    written = text[:, PROMPT:]
    loss = cross_entropy(logits.transpose(1, 2), written, reduction="none")
    repeats = repeated(written)
    same = (written == reference[:, PROMPT:]).int().cumprod(1).sum(1)
    quarters = {f"perplexity {i + 1}": part.mean().exp().item() for i, part in enumerate(split(loss))}
    return {
        "variant": name,
        "tokens": written.numel(),
        "perplexity": loss.mean().exp().item(),
        **quarters,
        "repetition": repeats.mean().item(),
        **{f"repetition {i + 1}": part.mean().item() for i, part in enumerate(split(repeats))},
        "diverged after": statistics.mean(same.tolist()),
    }


def split(x: Tensor) -> tuple[Tensor, ...]:
    """[texts, tokens] by quarter."""
    return x.tensor_split(QUARTERS, 1)


def repeated(texts: Tensor) -> Tensor:
    """Whether the 4-gram that ends at each token stood in the same text before, float32 [texts, tokens]."""
    found = torch.zeros(texts.shape)
    for line, text in enumerate(texts.tolist()):
        seen: set[tuple[int, ...]] = set()
        for end in range(GRAM, len(text) + 1):
            gram = tuple(text[end - GRAM : end])
            found[line, end - 1] = float(gram in seen)
            seen.add(gram)
    return found


def plot(rows: list[dict[str, Any]]) -> None:
    """Perplexity and repetition by quarter."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, quantity in zip(axes, ("perplexity", "repetition"), strict=True):
        for each in rows:
            style = "k-" if each["variant"] == "exact" else "o--" if "no feedback" in each["variant"] else "o-"
            values = [each[f"{quantity} {quarter + 1}"] for quarter in range(QUARTERS)]
            axis.plot(range(1, QUARTERS + 1), values, style, label=each["variant"])
        axis.set_xlabel("quarter of the generated text")
        axis.set_xticks(range(1, QUARTERS + 1))
        axis.set_title(
            {"perplexity": "perplexity under the exact model", "repetition": "share of repeated 4-grams"}[quantity]
        )
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(record.RESULTS / "accuracy_drift.png", dpi=120)


if __name__ == "__main__":
    main()
