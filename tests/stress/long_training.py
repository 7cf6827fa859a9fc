"""A long training run, checkpointed and resumed in the middle: the same weights, bit for bit, as without a stop.

    python tests/stress/long_training.py [--steps 10000] [--out FILE.json]

Two tensor-parallel ranks train two of Megatron's linear layers on what a fixed network of the same shape answers, with
every activation and gradient compressed. One run goes through and leaves a checkpoint half way, from which another one
goes on, in new processes. Weights and losses must be equal, and memory is read on the way.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from linears import HIDDEN, INNER, linear
from ranks import spawn, tensor_parallel
from record import circumstances
from soak import resident
from torch import Tensor

import flashcomm_megatron as fc

BATCH = 16


def train(rank: int, world: int, folder: str, first: int, last: int) -> dict[str, Any]:
    """Steps ``first`` to ``last`` - 1: from the checkpoint in ``folder`` if there is one, else leaving one half way."""
    tensor_parallel(world)
    torch.manual_seed(5)
    layers = torch.nn.ModuleList([linear("column", False, torch.float32), linear("row", False, torch.float32)])
    optimizer = torch.optim.AdamW(layers.parameters(), lr=3e-4)
    path = Path(folder) / f"{rank}.pt"
    if first:
        saved = torch.load(path, weights_only=True)
        layers.load_state_dict(saved["layers"])
        optimizer.load_state_dict(saved["optimizer"])
    losses, early = [], 0
    with fc.flashcomm(fc.Config(bits=8, grad_bits=8, min_bytes=0)):
        for step in range(first, last):
            if step == last // 2 > first:
                torch.save({"layers": layers.state_dict(), "optimizer": optimizer.state_dict()}, path)
            losses.append(advance(layers, optimizer, step))
            if step == first + (last - first) // 10:
                early = resident()
    memory = {
        "KiB early": early,
        "KiB late": resident(),
        "KiB peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    weights = [each.detach().clone() for each in layers.parameters()]
    return {"losses": losses, "weights": weights, "quantized": fc.stats()["quantized"], **memory}


def advance(layers: Any, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One step on the step's own batch; the loss."""
    x = torch.randn(BATCH, 1, HIDDEN, generator=torch.Generator().manual_seed(step))
    hidden, _ = layers[0](x)
    y, _ = layers[1](torch.nn.functional.gelu(hidden))
    loss = (y - answer(x)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def answer(x: Tensor) -> Tensor:
    """Of the network to be learnt."""
    generator = torch.Generator().manual_seed(99)
    first, second = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((HIDDEN, INNER), (INNER, HIDDEN)))
    return torch.nn.functional.gelu(x @ first) @ second


def compare(steps: int) -> dict[str, Any]:
    """Train through, and again from half way; what was found. AssertionError where they differ."""
    with tempfile.TemporaryDirectory() as folder:
        through = spawn(train, 2, folder, 0, steps, seconds=86400.0)
        resumed = spawn(train, 2, folder, steps // 2, steps, seconds=86400.0)
    for rank in range(2):
        pairs = zip(through[rank]["weights"], resumed[rank]["weights"], strict=True)
        assert all(torch.equal(*pair) for pair in pairs), f"rank {rank} resumed to other weights"
        assert through[rank]["losses"][steps // 2 :] == resumed[rank]["losses"]
        assert through[rank]["losses"] == through[0]["losses"], "ranks hold different losses"
    losses = through[0]["losses"]
    tenth = max(1, steps // 10)
    memory = {name: value for name, value in through[0].items() if name.startswith("KiB")}
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return {"steps": steps, "loss of the first tenth": first, "of the last": last, **memory} | {
        "quantized": through[0]["quantized"]
    }


def main(words: list[str]) -> int:
    """The command line of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(words)
    found = compare(asked.steps)
    text = json.dumps({"circumstances": circumstances(), **found}, indent=1) + "\n"
    print(text)
    if asked.out:
        asked.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
