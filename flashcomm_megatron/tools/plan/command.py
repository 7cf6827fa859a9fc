"""The options of plan, and their texts as numbers."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from . import PROJECTION
from .hardware import GB, LINKS
from .models import MODELS
from .tables import table

UNITS = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "kb": 1e3, "mb": 1e6, "gb": 1e9}


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 with a sentence when something asked for does not exist or does not fit."""
    options = _parser().parse_args(argv)
    try:
        found = table(options)
    except (ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.data, indent=1) if options.json else found.text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flashcomm_megatron plan",
        description=f"What compression would save: a {PROJECTION}.",
        epilog="Example: python -m flashcomm_megatron plan --gpu L40 --tp 8 --model llama-3-70b --bits 8,4. "
        "Without --gpu: a measured link, from --measured, or --link-rate, --compute-seconds and --codec-speed.",
    )
    add = parser.add_argument
    add("--gpu", help="a GPU of the table; an unknown name lists them")
    add("--tp", type=_count, default=8, help="GPUs that share each layer. Default: %(default)s")
    add("--model", default="llama-3-70b", help=f"{', '.join(MODELS)}, or a config.json. Default: %(default)s")
    add("--batch", type=_count, default=8, help="sequences. Default: %(default)s")
    add("--seq", type=_count, default=1024, help="tokens of each prompt. Default: %(default)s")
    add("--bits", type=_counts, default=[8, 6, 4], help="widths, with commas between. Default: 8,6,4")
    add("--recipe", default="auto", help="as --flash-comm-recipe. Default: %(default)s")
    add("--block", type=_count, help="as --flash-comm-block")
    add("--algorithm", default="auto", help="as --flash-comm-algorithm. Default: %(default)s")
    add("--min-bytes", type=int, help="as --flash-comm-min-bytes; 0 compresses everything")
    add("--link", help=f"the wires between GPUs: {', '.join(LINKS)}. Default: the GPU's usual ones")
    add("--link-rate", type=_rate, metavar="RATE", help="a measured rate of each GPU's link, as 1Gbit or 12GB")
    add("--latency", type=float, default=0.0, metavar="SECONDS", help="with --link-rate: of each exchange")
    add("--compute-seconds", type=float, metavar="SECONDS", help="without --gpu: measured compute of one step")
    add("--codec-speed", type=_speed, metavar="ENCODE,DECODE", help="without --gpu: GB/s of values on one rank")
    add("--measured", type=Path, metavar="FILE", help="the three of them from a link lab's JSON")
    add("--gpu-check", type=Path, metavar="FILE", help="gpu_check.json of make gpu-check, for the codec's speed")
    add("--nodes", type=_count, help="nodes of --tp GPUs each: one all-reduce over all of them")
    add("--rate", type=float, default=400.0, metavar="GBPS", help="Gbit/s of each GPU's network card. Default: 400")
    add("--sweep", action="store_true", help="draw where it starts to pay")
    add("--out", type=Path, default=Path("plan.png"), help="the figure of --sweep. Default: %(default)s")
    add("--json", action="store_true", help="print JSON")
    return parser


# ---- arguments -----------------------------------------------------------------------------------------------------


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1.")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part.strip()) for part in text.split(",")]


def _rate(text: str) -> float:
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) *([kmg]b(?:it)?)", text.lower())
    if found is None:
        expected = "a rate such as 100Mbit, 1Gbit (bits) or 12GB (bytes) a second"
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}.")
    return float(found[1]) * UNITS[found[2]]


def _speed(text: str) -> tuple[float, float]:
    try:
        encode, decode = (float(part) * GB for part in text.split(","))
        return encode, decode
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected two numbers such as 14.3,16.0.") from None
