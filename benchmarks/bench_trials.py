"""What recipe auto's rounding could still gain: other steps, other grids, other centres, at the same bytes.

    python benchmarks/bench_trials.py --model DIR --text FILE [--tp 2]

A LLaMA checkpoint runs in one process; its row-parallel sums, cut for ``tp`` ranks, are rounded once a rank: one-step,
without residual feedback. Each trial changes one thing of the rotated codec: 32 values a block, a byte for the step,
which it rounds to an eighth of an octave. Printed, and kept in results/: signal to noise of the sums, the rise of
perplexity. Per-feature means come from the first half of the windows; everything is scored on the second.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flashcomm_megatron.codec.rotated import LEVELS, Rotated, butterflies
from flashcomm_megatron.tools.accuracy.llama import Llama, windows
from flashcomm_megatron.tools.accuracy.ranks import exact

BLOCK = 32
WIDTHS = (5, 4.5, 3.5, 2.5)
OCTAVE = 8  # steps that a byte tells apart in a factor of two
Grid = Callable[[Tensor, int], Tensor]  # coefficients [blocks, block] and levels -> those they are rounded to


def eighths(step: Tensor) -> Tensor:
    """To the nearest step that a byte can name."""
    return torch.exp2((torch.log2(step) * OCTAVE).round() / OCTAVE)


def largest(c: Tensor) -> Tensor:
    """[blocks, 1]: the coefficient of largest magnitude, with its sign; never zero."""
    found = c.gather(1, c.abs().argmax(1, keepdim=True))
    return torch.where(found == 0, 1e-30, found)


def on_grid(c: Tensor, step: Tensor, levels: int) -> Tensor:
    """Rounded to multiples of ``step`` from -levels // 2 on; the sign of the step says which side has one more."""
    zero = levels // 2
    return (c / step).round().clamp(-zero, levels - 1 - zero) * step


def of_the_largest(c: Tensor, levels: int) -> Tensor:
    """The step from the largest coefficient."""
    top = largest(c)
    return on_grid(c, -top.sign() * eighths(top.abs() / (levels // 2)), levels)


def powers_of_two(c: Tensor, levels: int) -> Tensor:
    """Steps that are powers of two (E8M0), which never clip."""
    top = largest(c)
    return on_grid(c, -top.sign() * torch.exp2(torch.log2(top.abs() / (levels // 2)).ceil()), levels)


def least_squares(tries: int) -> Grid:
    """The step of least squared error of ``tries``, each an eighth of an octave below the last (two with fewer than 8
    levels). Three are what the codec tries up to 16 levels."""

    def grid(c: Tensor, levels: int) -> Tensor:
        top, apart = largest(c), 2 if levels < 8 else 1
        step = -top.sign() * eighths(top.abs() / (levels // 2))
        tried = torch.stack([on_grid(c, step * 2 ** (-k * apart / OCTAVE), levels) for k in range(tries)])
        best = (tried - c).square().sum(-1).argmin(0)
        return tried[best, torch.arange(len(c))]

    return grid


def cut(c: Tensor, levels: int) -> Tensor:
    """Steps of which the largest coefficient would take 5/16 more than there are, less with many levels."""
    top = largest(c)
    reach = levels / 2 + max(0.0, 5 / 16 - levels / 64)
    return on_grid(c, -top.sign() * eighths(top.abs() / reach), levels)


def affine_twice_as_long(c: Tensor, levels: int) -> Tensor:
    """Smallest and largest value in place of the largest alone, a byte each, over two blocks: the same bytes."""
    pairs = c[: len(c) // 2 * 2].reshape(-1, 2 * BLOCK)
    low, high = pairs.amin(1, keepdim=True), pairs.amax(1, keepdim=True)
    step = ((high - low) / (levels - 1)).clamp(min=1e-30)
    out = c.clone()
    out[: len(c) // 2 * 2] = (((pairs - low) / step).round() * step + low).view(-1, BLOCK)
    return out


def gaussian(c: Tensor, levels: int) -> Tensor:
    """The best levels for a normal distribution (Lloyd and Max), scaled by each block's root mean square."""
    grid = lloyd_max(levels)
    scale = eighths(c.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30))
    return grid[torch.bucketize(c / scale, (grid[1:] + grid[:-1]) / 2)] * scale


def lloyd_max(levels: int, rounds: int = 300) -> Tensor:
    """The levels of least squared error for a standard normal variable."""
    x = torch.special.ndtri((torch.arange(200_000) + 0.5) / 200_000).float()
    grid = torch.special.ndtri((torch.arange(levels) + 0.5) / levels).float()
    for _ in range(rounds):
        cell = torch.bucketize(x, (grid[1:] + grid[:-1]) / 2)
        grid = torch.zeros(levels).scatter_add(0, cell, x) / torch.bincount(cell, minlength=levels).clamp(min=1)
    return grid


GRIDS: dict[str, Grid] = {
    "the largest's step": of_the_largest,
    "steps powers of two": powers_of_two,
    "the best of three steps": least_squares(3),
    "the best of seven steps": least_squares(7),
    "the largest cut": cut,
    "minimum and step, blocks of 64": affine_twice_as_long,
    "levels for a normal distribution": gaussian,
}


class Rounded:
    """Sums whose parts were rounded by one trial."""

    def __init__(self, grid: Grid, bits: float, means: dict[str, Tensor] | None = None) -> None:
        self.grid, self.levels, self.means = grid, LEVELS[bits], means
        self.lost = self.sent = 0.0

    def __call__(self, site: str, parts: list[Tensor]) -> Tensor:
        wanted = exact(site, parts)
        found = exact(site, [self._rounded(part, rank, site) for rank, part in enumerate(parts)])
        self.lost += (found - wanted).double().square().sum().item()
        self.sent += wanted.double().square().sum().item()
        return found

    def _rounded(self, part: Tensor, rank: int, site: str) -> Tensor:
        center = 0.0 if self.means is None else self.means[site][rank]
        coefficients = butterflies((part - center).reshape(-1, BLOCK))
        return (butterflies(self.grid(coefficients, self.levels)) / BLOCK).view_as(part) + center


class Means:
    """Exact sums that note the mean of every rank's features."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows = 0

    def __call__(self, site: str, parts: list[Tensor]) -> Tensor:
        rows = torch.stack(parts).flatten(1, -2)
        self.sums[site] = self.sums.get(site, torch.zeros(())) + rows.sum(1)
        self.rows += rows.size(1)
        return exact(site, parts)

    def means(self) -> dict[str, Tensor]:
        """site -> [ranks, features]."""
        return {site: sums * len(self.sums) / self.rows for site, sums in self.sums.items()}


@torch.no_grad()
def loss(model: Llama, batches: Sequence[Tensor], tp: int, add: Any) -> float:
    """Mean cross entropy of the next token."""
    found = [
        cross_entropy(model(each, tp, add)[:, :-1].transpose(1, 2), each[:, 1:], reduction="none") for each in batches
    ]
    return torch.cat(found).double().mean().item()


def check(x: Tensor) -> None:
    """Two of the trials are the real codec."""
    for bits, grid in ((4.5, of_the_largest), (3.5, least_squares(3)), (2.5, least_squares(3))):
        codec = Rotated(bits, BLOCK)
        real = codec.decode_ref(codec.encode_ref(x), x.numel())
        ours = butterflies(grid(butterflies(x.view(-1, BLOCK)), codec.levels)).flatten() / BLOCK
        ratio = ((ours - x).square().sum() / (real - x).square().sum()).item()
        assert 0.98 < ratio < 1.02, f"{bits} bits: the trial's squared error is {ratio:.3f} times the codec's"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory of a LLaMA checkpoint.")
    parser.add_argument("--text", required=True, help="Text with <|endoftext|> between documents.")
    parser.add_argument("--tp", type=int, default=2, help="Tensor-parallel ranks to simulate.")
    parser.add_argument("--windows", type=int, default=64)
    options = parser.parse_args()
    check(torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)))
    model = Llama(options.model)
    first, second = windows(options.model, options.text, model, length=192, count=options.windows).chunk(2)
    noted = Means()
    loss(model, first.split(8), options.tp, noted)
    batches = second.split(8)
    exact_loss = loss(model, batches, options.tp, exact)
    trials: list[tuple[str, Grid, dict[str, Tensor] | None]] = [(name, grid, None) for name, grid in GRIDS.items()]
    trials.append(("less each feature's mean", of_the_largest, noted.means()))
    rows = []
    for bits in WIDTHS:
        for name, grid, means in trials:
            add = Rounded(grid, bits, means)
            rise = math.expm1(loss(model, batches, options.tp, add) - exact_loss)
            decibels = 10 * math.log10(add.sent / add.lost)
            rows.append({"bits": bits, "trial": name, "tp": options.tp, "decibels": decibels, "rise": rise})
            print(f"{bits:4} {name:34} {decibels:7.2f} dB  {rise:+8.2%}", flush=True)
    record.save(f"trials_tp{options.tp}", rows)


if __name__ == "__main__":
    main()
