"""Counts what the machine code of the kernels does for one value, without a GPU: benchmarks/results/sass_counts.json.

Warp instructions times 32 a value, from the difference of two lengths (what a thread block does for one more tile of
8192 values) and, where a block does one tile only, all of them; wavefronts of shared memory against the ideal.

    python benchmarks/bench_sass.py [--out FILE] [--architectures sm_90 sm_80]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import record as record_of
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from sass.kernels import FIRST, Kernels  # noqa: E402

from flashcomm_megatron.codec import Rotated, Uniform  # noqa: E402

TILE = 8192
CODECS = {
    "flash-v1 4 bits, blocks of 32": Uniform(4, 32),
    "flash-v1 4 bits, blocks of 128": Uniform(4, 128),
    "auto's reduce leg, 4.5 bits, blocks of 32": Rotated(4.5, 32),
    "auto's gather leg, 5 bits, blocks of 64": Rotated(5, 64),
    "rotated 4 bits, blocks of 32, searched": Rotated(4, 32),
}
BARS = {  # instructions a value, by how a row's name begins and ends
    ("flash-v1", ": encode"): 10,
    ("flash-v1", ": decode"): 7,
    ("auto", ": encode"): 24,
    ("auto", ": decode"): 16,
    ("auto", "fused two-step of two ranks"): 90,
}


def bar(name: str) -> float | None:
    """Of a row, if it has one."""
    return next((most for (first, last), most in BARS.items() if name.startswith(first) and name.endswith(last)), None)


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    """bfloat16 numbers as activations have them."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).bfloat16()


def row(fewer: Any, more: Any, values: int) -> dict[str, Any]:
    """What ``values`` more values cost."""
    return {
        "instructions": round((more.instructions - fewer.instructions) * 32 / values, 2),
        "wavefronts": round((more.wavefronts - fewer.wavefronts) / values, 4),
        "ideal_wavefronts": round((more.ideal_wavefronts - fewer.ideal_wavefronts) / values, 4),
    }


def codec_counts(architecture: str) -> dict[str, dict[str, Any]]:
    """{what: counts a value} of encoding and of decoding one payload, one thread block at work."""
    run, found = Kernels(architecture, torch.bfloat16, FIRST), {}
    for name, codec in CODECS.items():
        encoded, decoded = [], []
        for numel in (TILE, 2 * TILE):
            x = normal(numel)
            payload = run.encode(codec, x, enough=1, blocks=1)
            assert torch.equal(payload, codec.encode_ref(x)), name
            encoded.append(run.counts)
            run.decode_sum(codec, [payload], numel, enough=1, blocks=1)
            decoded.append(run.counts)
        found[f"{name}: encode"] = row(*encoded, TILE)
        found[f"{name}: decode"] = row(*decoded, TILE)
    return found


def fused_counts(architecture: str) -> dict[str, dict[str, Any]]:
    """{what: counts for a value of one rank} of two-step all-reduces of two ranks, launch and all."""
    found = {}
    for name, legs, codecs in (
        ("flash-v1", "uniform4", (Uniform(4, 128), Uniform(4, 128))),
        ("auto", "rotated", (Rotated(4.5, 32), Rotated(5, 64))),
    ):
        run, counts = Kernels(architecture, torch.bfloat16, f"-DLEGS={legs}"), []
        for numel in (2 * TILE, 4 * TILE):
            run.collective("two-step", codecs, [[normal(numel, rank) for rank in range(2)]], blocks=1)
            counts.append(run.counts)
        found[f"{name}: fused two-step of two ranks"] = row(*counts, 2 * 2 * TILE)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sass_counts.json")
    parser.add_argument("--architectures", nargs="+", default=["sm_90"])
    given = parser.parse_args()
    counts = {architecture: codec_counts(architecture) for architecture in given.architectures}
    for architecture, rows in counts.items():
        rows |= fused_counts(architecture)
        for name in rows:
            rows[name]["bar"] = bar(name)
    record = {
        "what": "warp instructions x 32 and wavefronts a value; tests/support/sass",
        "commit": record_of.commit(),
        "counts": counts,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    for architecture, rows in counts.items():
        for name, numbers in rows.items():
            print(architecture, name, numbers)


if __name__ == "__main__":
    main()
