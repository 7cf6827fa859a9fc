"""apex beside us: its norm and its fused weight gradient are used as without us, and get what ours compressed.

``stand_ins/apex`` computes with torch and counts its calls. That we do not need apex is what all other tests show.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from ranks import once
from torch import Tensor

import flashcomm_megatron as fc

# Not imported here: the ranks import this file before they put the stand-in where Megatron finds it.
pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

CONFIG = fc.Config(bits=4, min_bytes=0)
LINEARS = [f"decoder.layers.{layer}.{name}" for layer in range(2) for name in (*mixtures.ATTENTION, *mixtures.DENSE)]


def everything(rank: int, world: int) -> dict[str, Any]:
    """Gradients of one model by torch and by apex, with flash-comm off and on, and what apex was asked for."""
    from flashcomm_megatron import cpu

    sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "stand_ins" / "apex"))
    cpu.enable(force=True, scripts=True)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    plain, fused = (build(model_parallel_cuda_manual_seed, fusion) for fusion in (False, True))
    found = {"norms": {type(each).__name__ for name, each in fused.named_modules() if name.endswith("layernorm")}}
    found["exact"] = [gradients(plain), gradients(fused)]
    with fc.flashcomm(CONFIG):
        found["compressed"] = [gradients(plain), gradients(fused)]
        found["quantized"] = fc.stats()["quantized"]
    return found


def build(seed: Any, fusion: bool) -> Any:
    """The same model with and without the fused weight gradient."""
    seed(1)
    torch.manual_seed(1)
    model = mixtures.gpt(gradient_accumulation_fusion=fusion)
    for weight in model.parameters():
        weight.main_grad = torch.zeros_like(weight)
    return model


def gradients(model: Any) -> dict[str, Any]:
    """A training step: gradients of the linear layers' weights, and how often apex was called."""
    import fused_weight_gradient_mlp_cuda as fused
    from apex.normalization import fused_layer_norm as norm

    before, tokens = (fused.calls, norm.calls), torch.arange(mixtures.TOKENS).view(1, -1)
    model.zero_grad()
    for weight in model.parameters():
        weight.main_grad.zero_()
    model(tokens, tokens, None, labels=tokens).mean().backward()
    weights = {name: model.get_submodule(name).weight for name in LINEARS}
    kept = {name: each.main_grad + (0 if each.grad is None else each.grad) for name, each in weights.items()}
    return {"gradients": kept, "fused": fused.calls - before[0], "norms": norm.calls - before[1]}


seen = once(everything, 2, seconds=200)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in LINEARS)


def test_apex_is_asked_for_as_much_as_without_us(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert "FusedLayerNorm" in rank["norms"]
        for plain, fused in (rank["exact"], rank["compressed"]):
            assert (plain["fused"], fused["fused"]) == (0, len(LINEARS) + 1)  # and the output layer
            assert plain["norms"] == fused["norms"] == 5


def test_fused_gradients_are_those_of_the_compressed_forward(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for plain, fused in (rank["exact"], rank["compressed"]):
            assert equal(plain["gradients"], fused["gradients"])
        assert rank["quantized"] > 0
        assert not equal(rank["exact"][1]["gradients"], rank["compressed"][1]["gradients"])
