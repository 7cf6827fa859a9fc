"""What does a recipe cost in accuracy? ``python -m flashcomm_megatron accuracy --model DIR --text FILE``

Scores every combination of recipe, width and tensor-parallel size on a real checkpoint against the exact model:
perplexity and its relative rise, top-1 agreement, KL divergence, signal to noise by site, bits on the wire, and for how
long greedy generation stays the same. One process simulates all ranks with the collectives' own code, so results are
those of real ranks bit for bit. Writes accuracy.json, .csv and .png; run again, it goes on where it was stopped.

    --length and --generate up to the model's context show whether noise accumulates (rise_by_quarter and
    agreement_by_quarter); --sites shows which layers hurt most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from ...codec.recipes import RECIPES
from ...config import ALGORITHMS, Config
from . import plot, sweep
from .llama import Llama, windows
from .score import Bench, Score

PROMPT = 16  # tokens that generation starts from


def main(argv: list[str]) -> int:
    """Exit code of the command."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except ValueError as error:
        print(f"accuracy: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m flashcomm_megatron accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a LLaMA checkpoint in Hugging Face layout")
    parser.add_argument("--text", required=True, help="text file; documents may be parted by <|endoftext|>")
    parser.add_argument("--tp", type=_numbers, default=[1, 2, 4, 8], help="numbers of ranks, default 1,2,4,8")
    parser.add_argument("--bits", type=_numbers, default=[8, 6, 5, 4, 3, 2], help="widths, default 8,6,5,4,3,2")
    parser.add_argument("--recipe", default="all", help=f"all, or some of {', '.join(RECIPES)}")
    parser.add_argument("--block", type=_numbers, default=[None], help="block sizes, default the recipe's own")
    parser.add_argument(
        "--algorithm",
        choices=[each for each in ALGORITHMS if each != "hierarchical"],
        default="auto",
        help="as --flash-comm-algorithm",
    )
    parser.add_argument("--sequences", type=int, default=46, help="windows of text, default 46")
    parser.add_argument("--length", type=int, default=192, help="tokens of a window, default 192")
    parser.add_argument("--prompts", type=int, default=8, help="windows whose beginning is continued, default 8")
    parser.add_argument("--generate", type=int, default=64, help="tokens to generate for each, default 64; 0 for none")
    parser.add_argument("--sites", action="store_true", help="also score each site compressed alone")
    parser.add_argument("--out", default="accuracy", help="folder of the results, default accuracy")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _run(options: argparse.Namespace) -> int:
    recipes = list(RECIPES) if options.recipe == "all" else options.recipe.split(",")
    unknown = [name for name in recipes if name not in RECIPES]
    if unknown:
        raise ValueError(f"--recipe {unknown[0]}: choose all or some of {', '.join(RECIPES)}.")
    todo = sweep.combinations(recipes, options.bits, options.tp, options.block, options.algorithm)
    varying = ("tp", "bits", "recipe", "block", "algorithm", "out")
    settings = {key: value for key, value in vars(options).items() if key not in varying}
    settings |= {key: Path(settings[key]).name for key in ("model", "text")}
    results = sweep.Results(options.out, settings)
    model = Llama(options.model)
    if max(options.length, PROMPT + options.generate) > model.context:
        raise ValueError(f"--length and {PROMPT} + --generate must fit the model's context of {model.context} tokens.")
    text = windows(options.model, options.text, model, options.length, options.sequences)
    bench = Bench(model, text, options.prompts, PROMPT, options.generate)

    def score(config: Config, world: int) -> Score:
        return bench.score(config, world, options.sites)

    sweep.run(todo, results, score)
    has_plot = plot.draw(results.scores.values(), results.folder / "accuracy.png")
    print(_table(results.scores.values()))
    print(f"{results.path}" + ("" if has_plot else "; no plot: run pip install matplotlib"))
    return 0


def _table(scores: Iterable[Score]) -> str:
    rows = [f"{'recipe':<10} bits  TP  on the wire  perplexity     rise  agreement        KL  diverged after"]
    for each in scores:
        rows.append(
            f"{each.recipe:<10} {each.bits:>4} {each.tp:>3} {each.wire_bits:>12.3f} {each.perplexity:>11.4f}"
            f" {each.rise:>8.2%} {each.agreement:>10.2%} {each.kl:>9.5f} {each.diverged_after:>15.1f}"
        )
    return "\n".join(rows)
