"""What does a recipe cost in accuracy? ``python -m flashcomm_megatron accuracy --model DIR --text FILE``

Scores every combination of recipe, width and tensor-parallel size on a real checkpoint against the exact model:
perplexity and its relative rise, top-1 agreement, KL divergence, each with its standard error over the windows of text,
signal to noise by site, bits on the wire, and for how long greedy generation stays the same. One process simulates all
ranks with the collectives' own code, so results are those of real ranks bit for bit. Writes accuracy.json, .csv and
.png; run again, it goes on where it was stopped.

    --recipe quickreduce,fp8 are formats that others ship (QuickReduce's integers, E4M3 in blocks of 128) as yardsticks.

    --length and --generate up to the model's context show whether noise accumulates (rise_by_quarter and
    agreement_by_quarter); --sites shows which layers hurt most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from ...codec.recipes import RECIPES
from ...config import ALGORITHMS
from . import plot, sweep
from .baselines import BASELINES
from .llama import Llama, windows
from .score import Bench, Score

PROMPT = 16  # tokens that generation starts from
MOST_RANKS = 8  # of the sizes that are scored where --tp is not given
NAMES = (*RECIPES, *BASELINES)


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
    parser.add_argument("--tp", type=_numbers, help="numbers of ranks, default all up to 8 that the heads allow")
    parser.add_argument("--bits", type=_numbers, default=[8, 6, 5, 4, 3, 2], help="widths, default 8,6,5,4,3,2")
    parser.add_argument("--recipe", default="all", help=f"all, or some of {', '.join(NAMES)}")
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
    recipes = list(NAMES) if options.recipe == "all" else options.recipe.split(",")
    unknown = [name for name in recipes if name not in NAMES]
    if unknown:
        raise ValueError(f"--recipe {unknown[0]}: choose all or some of {', '.join(NAMES)}.")
    settings = {key: getattr(options, key) for key in ("sequences", "length", "prompts", "generate", "sites")}
    settings |= {key: Path(getattr(options, key)).name for key in ("model", "text")}
    results = sweep.Results(options.out, settings)
    model = Llama(options.model)
    worlds = _worlds(options.tp, model)
    wanted = sweep.methods(recipes, options.bits, worlds, options.block, options.algorithm)
    if max(options.length, PROMPT + options.generate) > model.context:
        raise ValueError(f"--length and {PROMPT} + --generate must fit the model's context of {model.context} tokens.")
    text = windows(options.model, options.text, model, options.length, options.sequences)
    sweep.run(wanted, results, Bench(model, text, options.prompts, PROMPT, options.generate), options.sites)
    has_plot = plot.draw(results.scores.values(), results.folder / "accuracy.png")
    print(_exact(results.exact, options))
    print(_table(results.scores.values()))
    print(f"{results.path}" + ("" if has_plot else "; no plot: run pip install matplotlib"))
    return 0


def _worlds(asked: list[int] | None, model: Llama) -> list[int]:
    """The tensor-parallel sizes to score; ValueError names those that the model's heads allow."""
    allowed = model.rank_counts
    refused = [world for world in asked or [] if world not in allowed]
    if refused:
        raise ValueError(
            f"--tp {refused[0]}: {model.heads} attention heads, {model.kv_heads} key/value heads and "
            f"{model.config['intermediate_size']} MLP features cannot all be shared by {refused[0]} ranks. "
            f"Choose from {', '.join(map(str, allowed))}."
        )
    return asked or [world for world in allowed if world <= MOST_RANKS]


def _exact(found: dict[str, float], options: argparse.Namespace) -> str:
    error = found["perplexity_error"]
    return (
        f"exact: perplexity {found['perplexity']:.4f}{'' if error is None else f' +- {error:.4f}'}, "
        f"{options.sequences} windows of {options.length} tokens. +- is the standard error over the windows."
    )


def _table(scores: Iterable[Score]) -> str:
    rows = [
        f"{'recipe':<11} bits  TP  on the wire  perplexity            rise           agreement                  KL"
        "  diverged after"
    ]
    for each in scores:
        rise = f"{each.rise:+.2%}{_plus_minus(each.rise_error, '.2%')}"
        agreement = f"{each.agreement:.2%}{_plus_minus(each.agreement_error, '.2%')}"
        kl = f"{each.kl:.5f}{_plus_minus(each.kl_error, '.5f')}"
        rows.append(
            f"{each.recipe:<11} {each.bits:>4} {each.tp:>3} {each.wire_bits:>12.3f} {each.perplexity:>11.4f}"
            f" {rise:>15} {agreement:>19} {kl:>19} {each.diverged_after:>15.1f}"
        )
    return "\n".join(rows)


def _plus_minus(error: float | None, form: str) -> str:
    return "" if error is None else f" +- {error:{form}}"
