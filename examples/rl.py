"""Reinforcement learning in 60 lines: why feedback must be off, and that log-probabilities then are equal.

    torchrun --nproc-per-node 2 examples/rl.py

REINFORCE on the shipped model: continue a prompt, reward short lines, take the gradient. RL compares the
log-probability that a token had when it was sampled (``eval``, no gradients) with the one of the training forward
(``train``). Residual feedback is on in evaluation only, so with it the two differ. With ``feedback="off"`` they are
equal, bit for bit.

You should see a difference of 0.0 in every step with feedback off, and one that is not 0.0 with ``auto``.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from demo import OWN_MODEL, continued
from hf_checkpoint import Checkpoint, read_shape
from hf_llama import build, load
from launch import start, stop, world_size
from tokenizers import Tokenizer
from torch import Tensor

import flashcomm_megatron as fc

PROMPT, BATCH, LENGTH = "def find_file(", 8, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="Optimizer steps.")
    parser.add_argument("--bits", type=int, default=4, help="Width of the sums.")
    args = parser.parse_args()
    shape = read_shape(OWN_MODEL, world_size())
    ranks = start()
    model = build(shape, ranks.world, torch.float32).to(ranks.device)
    load(model, Checkpoint(OWN_MODEL, shape), shape, ranks.rank, ranks.world)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokenizer = Tokenizer.from_file(str(OWN_MODEL / "tokenizer.json"))
    prompt = [shape.bos, *tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    newline = tokenizer.encode("\n", add_special_tokens=False).ids[0]
    for feedback in ("auto", "off"):
        fc.enable(bits=args.bits, min_bytes=0, feedback=feedback)
        for step in range(1, args.steps + 1):
            tokens = rollout(model, prompt, ranks)
            with torch.no_grad():
                old = log_probabilities(model.eval(), tokens, len(prompt))
            new = log_probabilities(model.train(), tokens, len(prompt))
            reward = (tokens[:, len(prompt) :] == newline).float().mean(1)
            (-(reward - reward.mean())[:, None] * new).mean().backward()
            if feedback == "off":
                optimizer.step()
            optimizer.zero_grad()
            difference = (new - old).abs().max().item()
            if ranks.rank == 0:
                print(f"feedback {feedback}, step {step}: reward {reward.mean():.3f}, difference {difference}")
    fc.disable()
    stop()


@torch.no_grad()
def rollout(model: Any, prompt: list[int], ranks: Any) -> Tensor:
    """[batch, prompt + LENGTH] tokens; prompts end differently, so that greedy texts differ."""
    starts = [[*prompt, 300 + number] for number in range(BATCH)]
    return torch.tensor(continued(model.eval(), starts, LENGTH - 1, ranks), device=ranks.device)


def log_probabilities(model: Any, tokens: Tensor, start: int) -> Tensor:
    """[batch, LENGTH] log-probabilities of the tokens after the prompt: minus Megatron's vocabulary-parallel loss."""
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(len(tokens), -1)
    losses: Tensor = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return -losses[:, start - 1 :]


if __name__ == "__main__":
    main()
