"""Every method on the same text, kept on disk after each forward, so that a stopped run goes on where it stopped."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...codec.recipes import RECIPES, Legs
from ...config import Config
from .baselines import BASELINES
from .score import Bench, Method, Score, Tally

QUIET = 30.0  # seconds between two lines of progress where stderr is no terminal
SAVED = 10.0  # seconds between two saves


def methods(
    recipes: Iterable[str], widths: Iterable[int], worlds: Iterable[int], blocks: Iterable[int | None], algorithm: str
) -> list[Method]:
    """All that exist; a recipe has no row for a width it does not define, a baseline has one block."""
    rows = []
    for name in recipes:
        defined = BASELINES[name].widths if name in BASELINES else RECIPES[name].widths
        for bits in (each for each in widths if each in defined):
            if name in BASELINES:
                codec = BASELINES[name].codec(bits)
                config = Config(bits=bits, recipe="flash-v2", min_bytes=0, algorithm="two-step")
                rows += [Method(name, config, world, Legs(codec, codec)) for world in worlds]
                continue
            calibration = "the text itself" if RECIPES[name].calibrated else None
            for block in blocks:
                config = Config(
                    bits=bits, recipe=name, block=block, min_bytes=0, algorithm=algorithm, calibration=calibration
                )
                rows += [Method(name, config, world) for world in worlds]
    return rows


class Results:
    """The scores so far, in ``folder``/accuracy.json and .csv. ValueError if they were made with other settings."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        self.folder, self.settings = Path(folder), settings
        self.scores: dict[str, Score] = {}
        self.tallies: dict[str, Tally] = {}  # of methods that are not done; "exact": of the exact model
        self.exact: dict[str, Any] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found["settings"] != settings:
                changed = sorted(key for key in settings if found["settings"].get(key) != settings[key])
                raise ValueError(f"{self.path} was made with other {', '.join(changed)}: choose another --out.")
            self.scores = {key: Score(**row) for key, row in found["scores"].items()}
            self.tallies = {key: Tally(**row) for key, row in found.get("unfinished", {}).items()}
            self.exact = found.get("exact", {})

    @property
    def path(self) -> Path:
        """The file that resumes."""
        return self.folder / "accuracy.json"

    def save(self) -> None:
        """Write both files."""
        content = {
            "settings": self.settings,
            "exact": self.exact,
            "scores": {key: asdict(row) for key, row in self.scores.items()},
            "unfinished": {key: asdict(row) for key, row in self.tallies.items()},
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1))
        part.replace(self.path)
        self._write_table()

    def _write_table(self) -> None:
        """One line a score; a list takes a column for each entry, sites stay in the JSON file."""
        with (self.folder / "accuracy.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            for number, score in enumerate(self.scores.values()):
                row: dict[str, Any] = {}
                for each in fields(Score):
                    value = getattr(score, each.name)
                    if isinstance(value, list):
                        row.update({f"{each.name}_{i + 1}": item for i, item in enumerate(value)})
                    elif not isinstance(value, dict):
                        row[each.name] = value
                if number == 0:
                    writer.writerow(row)
                writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row.values())


def run(wanted: list[Method], results: Results, bench: Bench, with_sites: bool) -> None:
    """Score what ``results`` does not hold yet; says how far it is and how long it will still take."""
    tallies = results.tallies
    bench.exact = tallies.setdefault("exact", bench.exact)
    todo = [(method, tallies.setdefault(method.key, Tally())) for method in wanted if method.key not in results.scores]
    progress = Progress(bench.steps(todo, with_sites) + len(todo)) if todo else None
    saved = time.monotonic()
    for steps in bench.run(todo, with_sites):
        if progress:
            progress.advance(steps, f"window {len(bench.exact.loss)} of {len(bench.windows)}")
        if time.monotonic() - saved > SAVED:
            results.save()
            saved = time.monotonic()
    perplexity, error = bench.exact_perplexity
    results.exact = {"perplexity": perplexity, "perplexity_error": error, "tokens": bench.windows.numel()}
    for method, tally in todo:
        results.scores[method.key] = bench.finish(method, tally)
        del tallies[method.key]
        results.save()
        if progress:
            progress.advance(1, method.key)


class Progress:
    """How much is done and how long the rest takes: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total
        self.started = self.told = time.monotonic()

    def advance(self, steps: int, what: str) -> None:
        """Say it after ``steps`` more."""
        self.done += steps
        now, on_terminal = time.monotonic(), sys.stderr.isatty()
        if not on_terminal and now - self.told < QUIET and self.done > steps and self.done < self.total:
            return
        self.told = now
        left = (now - self.started) / self.done * (self.total - self.done)
        rest = f"about {left / 60:.0f} min left" if left >= 60 else f"about {left:.0f} s left"
        text = f"{self.done} of {self.total} forwards, {what}, {rest}"
        if on_terminal:
            bar = "#" * (24 * self.done // self.total)
            print(f"\r[{bar:<24}] {text}\033[K", end="\n" * (self.done == self.total), file=sys.stderr, flush=True)
        else:
            print(f"accuracy: {text}", file=sys.stderr, flush=True)
