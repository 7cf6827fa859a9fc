"""Every combination, one after the other, kept on disk after each so that a stopped run goes on where it stopped."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...codec.recipes import RECIPES
from ...config import Config
from .score import Score

Combination = tuple[Config, int]  # and the number of ranks


def combinations(
    recipes: Iterable[str], widths: Iterable[int], worlds: Iterable[int], blocks: Iterable[int | None], algorithm: str
) -> list[Combination]:
    """All that exist; a recipe has no row for a width it does not define."""
    rows = []
    for recipe in recipes:
        calibration = "the text itself" if RECIPES[recipe].calibrated else None
        for bits in (each for each in widths if each in RECIPES[recipe].widths):
            for block in blocks:
                config = Config(
                    bits=bits, recipe=recipe, block=block, min_bytes=0, algorithm=algorithm, calibration=calibration
                )
                rows += [(config, world) for world in worlds]
    return rows


class Results:
    """The scores so far, in ``folder``/accuracy.json and .csv. ValueError if they were made with other settings."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        self.folder, self.settings = Path(folder), settings
        self.scores: dict[str, Score] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found["settings"] != settings:
                changed = sorted(key for key in settings if found["settings"].get(key) != settings[key])
                raise ValueError(f"{self.path} was made with other {', '.join(changed)}: choose another --out.")
            self.scores = {key: Score(**row) for key, row in found["scores"].items()}

    @property
    def path(self) -> Path:
        """The file that resumes."""
        return self.folder / "accuracy.json"

    def add(self, key: str, score: Score) -> None:
        """Keep a score, and write both files."""
        self.scores[key] = score
        content = {"settings": self.settings, "scores": {name: asdict(row) for name, row in self.scores.items()}}
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


def run(todo: list[Combination], results: Results, score: Callable[[Config, int], Score]) -> None:
    """Score what ``results`` does not hold yet, with a bar on a terminal."""
    started = time.monotonic()
    keys = {name(config, world): (config, world) for config, world in todo}
    missing = [key for key in keys if key not in results.scores]
    before = len(keys) - len(missing)
    for made, key in enumerate(missing):
        seconds = (time.monotonic() - started) / made if made else None
        _bar(before + made, len(keys), key, seconds)
        results.add(key, score(*keys[key]))
    _bar(len(keys), len(keys), "done", None)


def name(config: Config, world: int) -> str:
    """A combination in words: its key."""
    extra = f" block {config.block}" if config.block else ""
    return f"{config.recipe} {config.bits}-bit TP{world}{extra}" + (
        f" {config.algorithm}" if config.algorithm != "auto" else ""
    )


def _bar(done: int, total: int, what: str, seconds: float | None) -> None:
    if not sys.stderr.isatty():
        return
    filled = 24 * done // max(total, 1)
    left = "" if seconds is None else f", {seconds * (total - done) / 60:.0f} min left"
    end = "\n" if done == total else ""
    print(f"\r[{'#' * filled:<24}] {done}/{total} {what}{left}\033[K", end=end, file=sys.stderr, flush=True)
