"""LoRA: the base model is frozen, small adapters are trained, and the sums in forward and backward are compressed.

    torchrun --nproc-per-node 2 examples/lora.py --flash-comm-bits 4 --flash-comm-min-bytes 0
    torchrun --nproc-per-node 2 examples/lora.py                          exact, to compare

Frozen layers keep their collectives: row-parallel layers sum in forward, column-parallel ones sum the gradient of their
input in backward, so both gain. The adapters sit on the QKV and the MLP input layers; their gradients are exact.

You should see the loss fall, by the same amount with and without the flag, and one line that says what was saved.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from demo import OWN_MODEL
from hf_checkpoint import Checkpoint, read_shape
from hf_llama import build, load
from launch import start, stop, world_size
from tokenizers import Tokenizer
from torch import Tensor, nn

import flashcomm_megatron as fc

RANK, BATCH, CONTEXT = 8, 4, 128
ADAPTED = ("self_attention.linear_qkv", "mlp.linear_fc1")


class Adapter(nn.Module):
    """``B A x`` beside a column-parallel layer: A is on every rank, B is split like the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.a = nn.Parameter(torch.randn(RANK, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, RANK))
        layer.register_forward_hook(self.add)

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return output[0] + inputs[0] @ self.a.T @ self.b.T, output[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="Optimizer steps.")
    args = fc.add_arguments(parser).parse_args()
    shape = read_shape(OWN_MODEL, world_size())
    ranks = start()
    model = build(shape, ranks.world, torch.float32).to(ranks.device)
    load(model, Checkpoint(OWN_MODEL, shape), shape, ranks.rank, ranks.world)
    model.requires_grad_(False)
    layers = [layer for name, layer in model.named_modules() if name.endswith(ADAPTED)]
    adapters = nn.ModuleList(map(Adapter, layers)).to(ranks.device)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=3e-3)
    tokenizer = Tokenizer.from_file(str(OWN_MODEL / "tokenizer.json"))
    text = torch.tensor(tokenizer.encode((OWN_MODEL / "held-out.txt").read_text()).ids, device=ranks.device)
    for step in range(1, args.steps + 1):
        rows = text[: BATCH * (CONTEXT + 1)].view(BATCH, CONTEXT + 1)
        positions = torch.arange(CONTEXT, device=ranks.device).expand(BATCH, -1)
        loss = model(rows[:, :-1].contiguous(), positions, None, labels=rows[:, 1:].contiguous()).mean()
        loss.backward()
        for adapter in adapters:
            dist.all_reduce(adapter.a.grad)  # each rank's B gave its share
        optimizer.step()
        optimizer.zero_grad()
        if ranks.rank == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    stop()


if __name__ == "__main__":
    main()
