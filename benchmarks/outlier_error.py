"""What keeping the widest features exact is worth: recipe outlier against per-tensor static INT4, site by site.

    python benchmarks/outlier_error.py --model DIR --text FILE [--tp 8]

A LLaMA checkpoint runs in one process, its row-parallel sums cut for ``tp`` ranks. Both formats are calibrated on the
first half of the windows, by the same moving averages, and see the same partial sums of the second half: outlier with a
scale for each rank and feature, INT4 with one for each rank. Printed, and kept in results/, are the worst absolute
errors of any sum at each site, and how many times smaller outlier makes the worst and the root mean square error.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import record
import torch
from torch import Tensor

from flashcomm_megatron.codec.published.outlier import LARGEST, from_ranges
from flashcomm_megatron.tools.accuracy.llama import Llama, windows
from flashcomm_megatron.tools.accuracy.ranks import Recorder


class Errors(NamedTuple):
    """Of one format at one site, over all sums: the largest, and the sum of squares."""

    worst: float = 0.0
    squares: float = 0.0

    def add(self, error: Tensor) -> Errors:
        """With the errors of further sums."""
        return Errors(max(self.worst, error.abs().max().item()), self.squares + error.double().square().sum().item())


class Comparison:
    """Exact sums; the errors of both formats at every site, static INT4's first."""

    def __init__(self, ranges: dict[str, Tensor], tp: int) -> None:
        self.errors: dict[str, tuple[Errors, Errors]] = {}
        self.codecs = {site: [from_ranges(*each, rank) for rank in range(tp)] for site, each in ranges.items()}
        self.scales = {site: each.abs().amax((0, 2)) / LARGEST for site, each in ranges.items()}  # [tp]

    def __call__(self, site: str, parts: list[Tensor]) -> Tensor:
        exact = torch.stack(parts).sum(0)
        scales = self.scales[site].view(-1, *[1] * exact.dim())
        int4 = ((torch.stack(parts) / scales).round().clamp(-LARGEST - 1, LARGEST) * scales).sum(0)
        sent = [codec.encode(part.flatten()) for codec, part in zip(self.codecs[site], parts, strict=True)]
        outlier = self.codecs[site][0].decode_sum(sent, torch.empty(exact.numel())).view_as(exact)
        before = self.errors.get(site, (Errors(), Errors()))
        self.errors[site] = before[0].add(int4 - exact), before[1].add(outlier - exact)
        return exact


@torch.no_grad()
def measure(model: Llama, tokens: Tensor, tp: int) -> dict[str, tuple[Errors, Errors]]:
    """Errors of static INT4 and of outlier by site; ``tokens`` [windows, length]."""
    first, second = tokens.chunk(2)
    calibration = Recorder()
    for window in first.split(1):
        model(window, tp, calibration)
    comparison = Comparison(calibration.ranges, tp)
    for window in second.split(1):
        model(window, tp, comparison)
    return comparison.errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory of a LLaMA checkpoint.")
    parser.add_argument("--text", required=True, help="Text with <|endoftext|> between documents.")
    parser.add_argument("--tp", type=int, default=8, help="Tensor-parallel ranks to simulate.")
    options = parser.parse_args()
    model = Llama(options.model)
    tokens = windows(options.model, options.text, model, length=128, count=64)
    rows = [
        {
            "site": site,
            "tp": options.tp,
            "worst_int4": int4.worst,
            "worst_outlier": outlier.worst,
            "worst_ratio": int4.worst / outlier.worst,
            "rms_ratio": (int4.squares / outlier.squares) ** 0.5,
        }
        for site, (int4, outlier) in measure(model, tokens, options.tp).items()
    ]
    print(f"{'site':26}" + "".join(f"{name:>15}" for name in list(rows[0])[2:]))
    for row in rows:
        print(f"{row['site']:26}" + "".join(f"{value:15.3f}" for value in list(row.values())[2:]))
    record.save(f"outlier_error_tp{options.tp}", rows)


if __name__ == "__main__":
    main()
