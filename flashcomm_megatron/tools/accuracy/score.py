"""What compression does to a model: one recipe, width and number of ranks against the exact model on the same text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...codec.recipes import RECIPES
from ...config import Config
from .llama import Cache, Llama
from .ranks import Compressed, Ranges, Recorder, exact

BATCH = 16  # windows in one forward
QUARTERS = 4  # parts of the window that perplexity is also given for


@dataclass
class Score:
    """One row of the result."""

    recipe: str
    bits: int
    tp: int
    block: int
    wire_bits: (
        float  # per value, all included: mean of both legs, times tp / 2 for one-step, which sends that much more
    )
    perplexity: float
    rise: float  # of perplexity over the exact model's, relative
    agreement: float  # share of tokens whose most likely successor is the exact model's
    kl: float  # nats a token, exact model against this one
    rise_by_quarter: list[float]  # of the window: does noise accumulate with context?
    diverged_after: float  # tokens of greedy generation that are the exact model's, in the mean
    agreement_by_quarter: list[float]  # of a long generation that is kept on the exact model's path
    decibels: dict[str, float] = field(default_factory=dict)  # signal to noise by site
    rise_by_site: dict[str, float] = field(default_factory=dict)  # with this site alone compressed


@dataclass
class Totals:
    """Sums over all predicted tokens."""

    loss: Tensor  # by position, summed over windows
    agreed: float = 0.0
    kl: float = 0.0


class Bench:
    """A model, windows of text [windows, length] and exact generations, which all combinations are scored against."""

    def __init__(self, model: Llama, windows: Tensor, prompts: int, prompt_length: int, generated: int) -> None:
        self.model, self.windows = model, windows
        self.prompts, self.generated = windows[:prompts, :prompt_length], generated
        self.exact = self._totals(None).loss
        self.continuation = self._generate()
        self._ranges: dict[int, Ranges] = {}

    def score(self, config: Config, world: int, with_sites: bool, has_feedback: bool = True) -> Score:
        """Everything there is to know about ``config`` on ``world`` ranks."""
        ranges = self._calibrated(world) if RECIPES[config.recipe].calibrated else {}
        ranks = Compressed(config, world, ranges, has_feedback)
        totals = self._totals(ranks)
        agreed = self._follow(Compressed(config, world, ranges, has_feedback))
        count = totals.loss.numel() * len(self.windows)
        sites = self.model.sites if with_sites and world > 1 else []
        return Score(
            recipe=config.recipe,
            bits=config.bits,
            tp=world,
            block=config.legs.gather.block if config.recipe == "outlier" else config.legs.reduce.block,
            wire_bits=ranks.bits_per_value,
            perplexity=math.exp(totals.loss.sum().item() / count),
            rise=self._rise(totals.loss),
            agreement=totals.agreed / count,
            kl=totals.kl / count,
            rise_by_quarter=[self._rise(totals.loss, quarter) for quarter in range(QUARTERS)],
            diverged_after=_common_prefix(agreed),
            agreement_by_quarter=_means(agreed),
            decibels=ranks.decibels,
            rise_by_site={
                site: self._rise(self._totals(Compressed(config, world, ranges, sites={site})).loss) for site in sites
            },
        )

    def _rise(self, loss: Tensor, quarter: int | None = None) -> float:
        """Relative rise of perplexity, over the whole window or one quarter of it."""
        excess = (loss - self.exact) / len(self.windows)
        return math.expm1((excess if quarter is None else excess.tensor_split(QUARTERS)[quarter]).mean().item())

    @torch.no_grad()
    def _totals(self, ranks: Compressed | None) -> Totals:
        """Losses of the text with the sums of ``ranks``, None for exact ones, compared with the exact model's."""
        totals = Totals(torch.zeros(self.windows.size(1) - 1, dtype=torch.float64))
        for batch in torch.split(self.windows, BATCH):
            reference = logits = self.model(batch, 1, exact)[:, :-1]
            if ranks is not None:
                ranks.begin()
                logits = self.model(batch, ranks.world, ranks)[:, :-1]
                totals.agreed += (logits.argmax(-1) == reference.argmax(-1)).sum().item()
                wanted, found = reference.log_softmax(-1), logits.log_softmax(-1)
                totals.kl += (wanted.exp() * (wanted - found)).sum().item()
            loss = cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
            totals.loss += loss.double().sum(0)
        return totals

    @torch.no_grad()
    def _generate(self) -> Tensor:
        """The exact model's greedy continuation [prompts, generated] of the prompts."""
        cache: Cache = {}
        tokens, out = self.prompts, []
        for _ in range(self.generated):
            tokens = self.model(tokens, 1, exact, cache)[:, -1:].argmax(-1)
            out.append(tokens)
        return torch.cat(out, 1) if out else self.prompts[:, :0]

    @torch.no_grad()
    def _follow(self, ranks: Compressed) -> Tensor:
        """Whether the compressed model would take the exact model's next token, [prompts, generated].

        It is put back on the exact path after each token, so up to the first False this is its own generation.
        """
        cache: Cache = {}
        tokens, out = self.prompts, []
        for step in range(self.generated):
            ranks.begin()
            predicted = self.model(tokens, ranks.world, ranks, cache)[:, -1].argmax(-1)
            tokens = self.continuation[:, step : step + 1]
            out.append(predicted == tokens[:, 0])
        return torch.stack(out, 1) if out else torch.ones(len(self.prompts), 0, dtype=torch.bool)

    def _calibrated(self, world: int) -> Ranges:
        """Ranges of the partial sums over all windows, each a batch of its own."""
        if world not in self._ranges:
            recorder = Recorder()
            with torch.no_grad():
                for window in torch.split(self.windows, 1):
                    self.model(window, world, recorder)
            self._ranges[world] = recorder.ranges
        return self._ranges[world]


def _means(agreed: Tensor) -> list[float]:
    """Share of True in each quarter of bool [rows, steps]."""
    return [part.float().mean().item() for part in agreed.tensor_split(QUARTERS, 1) if part.numel()]


def _common_prefix(agreed: Tensor) -> float:
    """Mean number of leading True of bool [rows, steps]."""
    return agreed.long().cumprod(1).sum(1).float().mean().item()
