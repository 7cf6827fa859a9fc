"""Greedy tokens and logits of a prompt do not depend on what stands beside it in the batch, nor on how many.

Real GPT models on two ranks over gloo, in batch-invariant mode with compression on. Where Megatron's own products on
this CPU notice the batch, the exact model says so, and nothing can be asked of the compressed one.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import forks
import pytest
import torch
from ranks import once, tensor_parallel
from torch import Tensor

import flashcomm_megatron as fc

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

WORLD, LENGTH, STEPS = 2, 2, 4  # alone, a prompt is below the minimum size of a tensor
HIDDEN = (64, 80, 100)  # whole blocks, and ends of rows that are none
RECIPES = ("auto", "flash-v1", "flash-v2", "mx")


def everything(rank: int, world: int) -> dict[str, Any]:
    """For every recipe, and for exact sums: whether prompt 0 has the same logits beside others and alone."""
    tensor_parallel(world, scripts=True)
    import structures

    found: dict[str, Any] = {}
    for hidden in HIDDEN:
        model = structures.build("pre-norm", world, hidden=hidden)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.batch_invariant_mode = True  # its own checks ask for kernels of a GPU
        found[f"exact {hidden}"] = invariant(model)
        for recipe in RECIPES:
            fc.reset_stats()
            with fc.flashcomm(bits=4, recipe=recipe):
                found[f"{recipe} {hidden}"] = {"same": invariant(model), "stats": fc.stats()}
    return found


def prompts(seed: int, count: int) -> Tensor:
    return torch.randint(0, 128, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generated(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy tokens of every prompt, and the logits they were taken from."""
    logits = []
    for _ in range(STEPS):
        places = torch.arange(ids.size(1)).expand_as(ids)
        step = model(ids, places, None)[:, -1]  # this rank's part of the vocabulary
        whole = [torch.empty_like(step) for _ in range(WORLD)]
        torch.distributed.all_gather(whole, step.contiguous())
        logits.append(torch.cat(whole, -1))
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return ids[:, LENGTH:], torch.stack(logits, 1)


def invariant(model: Any) -> dict[str, bool]:
    """Whether tokens and logits of prompt 0 stay the same beside other prompts, fewer, and alone."""
    first, others = prompts(0, 1), prompts(1, 3)
    expected = [each[0] for each in generated(model, torch.cat([first, others]))]
    cases = {"other prompts": prompts(2, 3), "fewer": prompts(2, 1), "alone": others[:0]}
    return {
        name: all(map(torch.equal, expected, [each[0] for each in generated(model, torch.cat([first, beside]))]))
        for name, beside in cases.items()
    }


seen = once(everything, WORLD, seconds=300, kind=forks.MEGATRON)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_prompt_does_not_notice_the_others(seen: list[dict[str, Any]], recipe: str, hidden: int) -> None:
    for rank in seen:
        exact, found = rank[f"exact {hidden}"], rank[f"{recipe} {hidden}"]
        assert exact["other prompts"], "a batch of the same shape has the same products"
        assert found["stats"]["quantized"] > 0 and not found["stats"]["deferred"]
        for name, same in found["same"].items():
            assert same or not exact[name], f"{recipe}: {name}"
