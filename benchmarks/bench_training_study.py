"""Convergence: what compressing forward and backward does to the validation loss, against the exact run of each seed.

run as:  python benchmarks/bench_training_study.py --text FILE      (about an hour on two cores)
         python benchmarks/bench_training_study.py --report         (tables and plot of what has run so far)

A GPT of Megatron-Core with its mixed-precision optimizer (training_loop.py), TP2 over gloo, on a text cut into a
training and a validation part. Every setting is run with the same seeds, a seed deciding weights and batches. A run is
one line of results/training_study.jsonl, so a study that was interrupted goes on where it stopped; ``--report`` writes
training_study.csv, .json and .png and the table of docs/training.md. Losses are nats a token.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from training_loop import Shape, Training, join

import flashcomm_megatron as fc

WORLD = 2
SHAPE = Shape(layers=4, batch=8)
STEPS = 300
PEAK_LR = 1e-3
EVERY = 10  # steps averaged in a point of the training curve
SEEDS = (1, 2, 3)
WINDOWS = 192  # of the validation text, for the final loss
RUNS = record.RESULTS / "training_study.jsonl"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"


class Setting(NamedTuple):
    """What one row of the table ran with; bits None: flash-comm off."""

    bits: int | None = None
    grad_bits: int = 16
    sequence_parallel: bool = False

    @property
    def name(self) -> str:
        """As in the tables: forward/backward, parallelism."""
        widths = "exact" if self.bits is None else f"{self.bits}/{self.grad_bits if self.grad_bits < 16 else 'exact'}"
        return f"{'SP' if self.sequence_parallel else 'TP'} {widths}"


SETTINGS = (
    Setting(),
    Setting(8, 8),
    Setting(6, 8),
    Setting(4, 8),
    Setting(2, 8),
    Setting(4, 4),
    Setting(4, 2),
    Setting(sequence_parallel=True),
    Setting(6, 8, sequence_parallel=True),
    Setting(4, 8, sequence_parallel=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("FLASHCOMM_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--text", type=Path, default=data / "wikitext2-valid.txt", help="a text of a megabyte or more")
    parser.add_argument("--only", nargs="*", help="settings to run, by name, for example 'TP 4/8'")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--report", action="store_true", help="run nothing, report")
    options = parser.parse_args()
    if not options.report:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(ranks, (folder, options), nprocs=WORLD)
    report()


# ---- running ------------------------------------------------------------------------------------------------------


def ranks(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One rank's part of every run that is not there yet; rank 0 keeps the results."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    join(tensor=WORLD)
    train, held_out = tokens(options.text.read_text(encoding="utf-8"))
    done = {(row["setting"], row["seed"]) for row in read()}
    for seed in options.seeds:
        for setting in SETTINGS:
            wanted = not options.only or setting.name in options.only
            if wanted and (setting.name, seed) not in done:
                row = run(setting, seed, train, held_out)
                keep(rank, row)
    dist.barrier()
    dist.destroy_process_group()


def run(setting: Setting, seed: int, train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Train once; the line of the file."""
    fc.reset_stats()
    if setting.bits is not None:
        fc.enable(bits=setting.bits, grad_bits=setting.grad_bits)
    started = time.perf_counter()
    training = Training(SHAPE, seed, STEPS, peak_lr=PEAK_LR, sequence_parallel=setting.sequence_parallel)
    losses = [training.step(train) for _ in range(STEPS)]
    counted = fc.stats()
    validation = training.evaluate(held_out, WINDOWS)
    fc.disable()
    return {
        "setting": setting.name,
        "seed": seed,
        **setting._asdict(),
        "validation loss": validation,
        "evaluated exactly": validation if setting.bits is None else training.evaluate(held_out, WINDOWS),
        "curve": [statistics.mean(losses[i : i + EVERY]) for i in range(0, STEPS, EVERY)],
        "exact bytes": counted["exact_bytes"] // STEPS,
        "wire bytes": counted["wire_bytes"] // STEPS,
        "seconds": round(time.perf_counter() - started, 1),
        "steps": STEPS,
        "shape": SHAPE._asdict(),
        "commit": record.commit(),
    }


def tokens(text: str) -> tuple[Tensor, Tensor]:
    """The first nine tenths of a text and the rest, in a byte-level BPE trained on the former."""
    cut = text.index("\n", len(text) * 9 // 10)
    parts = text[:cut], text[cut:]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SHAPE.vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(parts[0].splitlines(keepends=True), trainer)
    train, held_out = (torch.tensor(tokenizer.encode(part).ids) for part in parts)
    return train, held_out


def keep(rank: int, row: dict[str, Any]) -> None:
    """Append the line and say so, on rank 0."""
    if rank == 0:
        RUNS.parent.mkdir(exist_ok=True)
        with RUNS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['setting']:24} seed {row['seed']}  {row['validation loss']:.4f}  {row['seconds']} s", flush=True)


def read() -> list[dict[str, Any]]:
    """Every run of this shape and length."""
    rows = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    return [row for row in rows if row["steps"] == STEPS and row["shape"] == SHAPE._asdict()]


# ---- reporting ----------------------------------------------------------------------------------------------------


def report() -> None:
    """Table to the terminal, the page of docs and CSV; plot."""
    runs = read()
    rows = [row for setting in SETTINGS if (row := summary(setting, runs))]
    lines = [list(rows[0]), ["---", *["--:"] * (len(rows[0]) - 1)], *(list(map(str, row.values())) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    PAGE.write_text(
        re.sub(r"(<!-- study -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", PAGE.read_text(), flags=re.S)
    )
    record.save("training_study", rows)
    plot(runs)


def summary(setting: Setting, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: mean loss over the seeds, its difference to the exact runs of the same seeds, and their range."""
    mine, exact = by_seed(setting, runs), by_seed(Setting(sequence_parallel=setting.sequence_parallel), runs)
    seeds = sorted(mine.keys() & exact.keys())
    if not seeds:
        return {}
    losses = [mine[seed]["validation loss"] for seed in seeds]
    against = [exact[seed]["validation loss"] for seed in seeds]
    changes = [100 * (a / b - 1) for a, b in zip(losses, against, strict=True)]
    mean, sent = statistics.mean(losses), mine[seeds[0]]
    return {
        "setting": setting.name,
        "seeds": len(seeds),
        "loss": round(mean, 4),
        "lowest": round(min(losses), 4),
        "highest": round(max(losses), 4),
        "evaluated exactly": round(statistics.mean(mine[seed]["evaluated exactly"] for seed in seeds), 4),
        "change %": round(100 * (mean / statistics.mean(against) - 1), 3),
        "worst seed %": round(max(changes), 3),
        "inside": ("yes" if min(against) <= mean <= max(against) else "no") if len(seeds) == len(SEEDS) else "",
        "bytes %": round(100 * sent["wire bytes"] / sent["exact bytes"], 1) if sent["exact bytes"] else 100.0,
    }


def by_seed(setting: Setting, runs: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {row["seed"]: row for row in runs if row["setting"] == setting.name}


def plot(runs: list[dict[str, Any]]) -> None:
    """Training loss of every setting minus that of the exact run with the same seed: mean and range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(12, 8), width_ratios=(1, 1.4), layout="constrained")
    for row, parallel in zip(panels, (False, True), strict=True):
        settings = [each for each in SETTINGS if each.sequence_parallel == parallel]
        for number, setting in enumerate(settings):
            draw(row, setting, runs, "black" if setting.bits is None else f"C{number - 1}")
        row[0].set(title=f"{settings[0].name[:2]}: training loss", xlabel="step", ylabel="nats a token")
        row[1].set(title="difference to the exact run of the same seed", xlabel="step", ylim=(-0.015, 0.03))
        row[1].legend(fontsize=8, ncols=2)
    figure.suptitle(f"Mean and range over {len(SEEDS)} seeds; bits forward/backward")
    figure.savefig(record.RESULTS / "training_study.png", dpi=130)


def draw(panels: Any, setting: Setting, runs: list[dict[str, Any]], colour: str) -> None:
    """One setting's curve with its band, as it is and against exact."""
    mine, exact = by_seed(setting, runs), by_seed(Setting(sequence_parallel=setting.sequence_parallel), runs)
    seeds = sorted(mine.keys() & exact.keys())
    if not seeds:
        return
    curves = torch.tensor([mine[seed]["curve"] for seed in seeds])
    differences = curves - torch.tensor([exact[seed]["curve"] for seed in seeds])
    steps = torch.arange(1, curves.shape[1] + 1) * EVERY
    for panel, values in zip(panels, (curves, differences), strict=True):
        panel.fill_between(steps, values.amin(0), values.amax(0), color=colour, alpha=0.15, linewidth=0)
        panel.plot(steps, values.mean(0), color=colour, label=setting.name, linewidth=1.2)


if __name__ == "__main__":
    main()
