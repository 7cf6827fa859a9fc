"""What compression does to a model: methods against the exact model on the same text, window by window.

The exact model reads a batch of windows once, then every method reads the same batch and is compared with it, so that
the logits of one batch are all that is held. What a method gave on each window is kept (:class:`Tally`): that is what a
stopped run goes on from, and what standard errors come from.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...codec.recipes import RECIPES, Legs
from ...config import Config
from .llama import Cache, Llama
from .ranks import Compressed, Ranges, Recorder, exact

LOGITS = 1 << 24  # numbers in the logits of one batch, at most: 64 MiB
QUARTERS = 4  # parts of the window that perplexity is also given for


class Method(NamedTuple):
    """What is scored: a configuration on ``world`` ranks; ``legs``: the codecs of one of the lab's own baselines."""

    recipe: str
    config: Config
    world: int
    legs: Legs | None = None
    has_feedback: bool = True

    @property
    def key(self) -> str:
        """The method in words."""
        words = [f"{self.recipe} {self.config.bits}-bit TP{self.world}"]
        words += [f"block {self.config.block}"] if self.config.block else []
        words += [self.config.algorithm] if self.config.algorithm != "auto" and self.legs is None else []
        return " ".join(words)


@dataclass
class Tally:
    """What a method gave so far. The lists have an entry for each window."""

    loss: list[list[float]] = field(default_factory=list)  # nats of each quarter of the window, summed
    agreed: list[int] = field(default_factory=list)  # tokens
    kl: list[float] = field(default_factory=list)  # nats, summed
    site_loss: dict[str, list[float]] = field(default_factory=dict)  # nats with this site alone compressed
    lost: dict[str, float] = field(default_factory=dict)  # squared error by site
    sent: dict[str, float] = field(default_factory=dict)  # squared values by site
    bits: float = 0.0
    values: int = 0


@dataclass
class Score:
    """One row of the result. The errors are standard errors over the windows; None for one window."""

    recipe: str
    bits: int
    tp: int
    block: int
    wire_bits: float  # a value, all included: mean of both legs; of one-step, which sends more, that times tp / 2
    perplexity: float
    rise: float  # of perplexity over the exact model's, relative
    agreement: float  # share of tokens whose most likely successor is the exact model's
    kl: float  # nats a token, exact model against this one
    rise_by_quarter: list[float]  # of the window: does noise accumulate with context?
    diverged_after: float  # tokens of greedy generation that are the exact model's, in the mean
    agreement_by_quarter: list[float]  # of a long generation that is kept on the exact model's path
    decibels: dict[str, float] = field(default_factory=dict)  # signal to noise by site
    rise_by_site: dict[str, float] = field(default_factory=dict)  # with this site alone compressed
    rise_error: float | None = None
    agreement_error: float | None = None
    kl_error: float | None = None


class Bench:
    """A model, windows of text [windows, length] and exact generations, which all methods are scored against."""

    def __init__(self, model: Llama, windows: Tensor, prompts: int, prompt_length: int, generated: int) -> None:
        self.model, self.windows = model, windows
        self.prompts, self.generated = windows[:prompts, :prompt_length], generated
        self.exact = Tally()
        self._ranges: dict[int, Ranges] = {}
        self.batch = max(LOGITS // (windows.size(1) * int(model.config["vocab_size"])), 1)

    def score(self, config: Config, world: int, with_sites: bool, has_feedback: bool = True) -> Score:
        """Everything there is to know about one configuration on ``world`` ranks."""
        method, tally = Method(config.recipe, config, world, None, has_feedback), Tally()
        for _ in self.run([(method, tally)], with_sites):
            pass
        return self.finish(method, tally)

    def steps(self, todo: Sequence[tuple[Method, Tally]], with_sites: bool) -> int:
        """How many forwards :meth:`run` still takes."""
        each = 1 + (len(self.model.sites) if with_sites else 0)
        left = sum(math.ceil((len(self.windows) - len(tally.loss)) / self.batch) * each for _, tally in todo)
        return left + math.ceil((len(self.windows) - self._first(todo)) / self.batch)

    def _first(self, todo: Sequence[tuple[Method, Tally]]) -> int:
        """The first window that the exact model or some method has not read."""
        return min(len(tally.loss) for tally in (self.exact, *(tally for _, tally in todo)))

    @torch.no_grad()
    def run(self, todo: Sequence[tuple[Method, Tally]], with_sites: bool) -> Iterator[int]:
        """Read what is left of the text with the exact model and every method; yields how many forwards it made."""
        first = self._first(todo)
        while first < len(self.windows):
            batch = self.windows[first : first + self.batch]
            reference = self.model(batch, 1, exact)[:, :-1]
            if len(self.exact.loss) == first:
                self.exact.loss += _losses(reference, batch)
            yield 1
            for method, tally in todo:
                if len(tally.loss) == first:
                    sites = self.model.sites if with_sites and method.world > 1 else []
                    for site in sites:
                        logits = self._read(batch, self._ranks(method, {site}))
                        tally.site_loss.setdefault(site, []).extend(sum(row) for row in _losses(logits, batch))
                    ranks = self._ranks(method)
                    _compare(self._read(batch, ranks), reference, batch, tally)
                    _note(ranks, tally)
                    yield 1 + len(sites)
            first += len(batch)

    def _read(self, batch: Tensor, ranks: Compressed) -> Tensor:
        return self.model(batch, ranks.world, ranks)[:, :-1]

    def _ranks(self, method: Method, sites: set[str] | None = None) -> Compressed:
        config, world, layers = method.config, method.world, self.model.layers
        if RECIPES[config.recipe].calibrated and world not in self._ranges:
            recorder = Recorder()
            with torch.no_grad():
                for window in torch.split(self.windows, 1):  # each a batch of its own
                    self.model(window, world, recorder)
            self._ranges[world] = recorder.ranges
        return Compressed(config, world, self._ranges.get(world, {}), method.has_feedback, sites, method.legs, layers)

    # ---- scores --------------------------------------------------------------------------------------------------

    @property
    def exact_perplexity(self) -> tuple[float, float | None]:
        """Of the exact model, and its standard error over the windows."""
        means = [sum(row) / self._predicted for row in self.exact.loss]
        perplexity, error = math.exp(statistics.fmean(means)), _error(means)
        return perplexity, None if error is None else perplexity * error

    @property
    def _predicted(self) -> int:
        """Tokens of a window that are predicted."""
        return int(self.windows.size(1)) - 1

    def finish(self, method: Method, tally: Tally) -> Score:
        """The score of a method that has read all windows; it generates as well."""
        agreed = self._follow(self._ranks(method))
        count, config = self._predicted, method.config
        excess = [(sum(a) - sum(b)) / count for a, b in zip(tally.loss, self.exact.loss, strict=True)]
        rise, error = math.expm1(statistics.fmean(excess)), _error(excess)
        legs, exact_loss = method.legs or config.legs, sum(map(sum, self.exact.loss))
        return Score(
            recipe=method.recipe,
            bits=config.bits,
            tp=method.world,
            block=legs.gather.block if config.recipe == "outlier" else legs.reduce.block,
            wire_bits=tally.bits / tally.values if tally.values else 0.0,
            perplexity=math.exp(statistics.fmean(sum(row) / count for row in tally.loss)),
            rise=rise,
            agreement=statistics.fmean(tally.agreed) / count,
            kl=statistics.fmean(tally.kl) / count,
            rise_by_quarter=self._rise_by_quarter(tally),
            diverged_after=agreed.long().cumprod(1).sum(1).float().mean().item(),  # the leading True of each row
            agreement_by_quarter=[p.float().mean().item() for p in agreed.tensor_split(QUARTERS, 1) if p.numel()],
            decibels={s: 10 * math.log10(tally.sent[s] / lost) for s, lost in tally.lost.items() if lost},
            rise_by_site={
                site: math.expm1((sum(losses) - exact_loss) / (count * len(losses)))
                for site, losses in tally.site_loss.items()
            },
            rise_error=None if error is None else (1 + rise) * error,
            agreement_error=_error([agreed / count for agreed in tally.agreed]),
            kl_error=_error([kl / count for kl in tally.kl]),
        )

    def _rise_by_quarter(self, tally: Tally) -> list[float]:
        sizes = [len(part) for part in torch.empty(self._predicted).tensor_split(QUARTERS)]
        sums = [
            sum(a[quarter] - b[quarter] for a, b in zip(tally.loss, self.exact.loss, strict=True))
            for quarter in range(QUARTERS)
        ]
        return [math.expm1(each / max(size * len(tally.loss), 1)) for each, size in zip(sums, sizes, strict=True)]

    # ---- generation ----------------------------------------------------------------------------------------------

    @cached_property
    @torch.no_grad()
    def continuation(self) -> Tensor:
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


def _losses(logits: Tensor, batch: Tensor) -> list[list[float]]:
    """Nats of each quarter of every window."""
    loss = cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").double()
    return [[part.sum().item() for part in row.tensor_split(QUARTERS)] for row in loss]


def _compare(logits: Tensor, reference: Tensor, batch: Tensor, tally: Tally) -> None:
    """Add the windows of ``batch``, read by a method, to its tally."""
    tally.loss += _losses(logits, batch)
    tally.agreed += (logits.argmax(-1) == reference.argmax(-1)).sum(1).tolist()
    for found, wanted in zip(logits, reference, strict=True):
        expected = wanted.log_softmax(-1)
        tally.kl.append((expected.exp() * (expected - found.log_softmax(-1))).sum().item())


def _note(ranks: Compressed, tally: Tally) -> None:
    """Add what the ranks sent and lost."""
    for site in ranks.sent:
        tally.lost[site] = tally.lost.get(site, 0.0) + ranks.lost[site]
        tally.sent[site] = tally.sent.get(site, 0.0) + ranks.sent[site]
    tally.bits += ranks.bits
    tally.values += ranks.values


def _error(values: Sequence[float]) -> float | None:
    """Standard error of their mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
