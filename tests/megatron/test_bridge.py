"""Megatron-Bridge builds a model from its provider: fc.enable() before is all, and feedback is measured as elsewhere.

Its training loop needs packages that exist for GPU machines only, so it is not run here.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import spawn

import flashcomm_megatron as fc


def is_installed() -> bool:
    """Whether the package is there; importing it costs a minute."""
    return find_spec("megatron") is not None and find_spec("megatron.bridge") is not None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason="megatron-bridge is not installed")]


def provided(rank: int, world: int) -> list[dict[str, Any]]:
    """What a training step and two evaluations of a provider's model counted."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "stand_ins" / "transformer_engine"))  # it imports it
    from flashcomm_megatron import cpu

    cpu.enable(force=True, scripts=True)
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    model_parallel_cuda_manual_seed(1)
    fc.enable(bits=8, min_bytes=0)
    fusions = ["gradient_accumulation", "bias_dropout", "masked_softmax", "bias_activation", "cross_entropy_loss"]
    provider = GPTModelProvider(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, seq_length=16, vocab_size=128,
        tensor_model_parallel_size=world, transformer_layer_spec=local_layer_spec, use_cpu_initialization=True,
        params_dtype=torch.float32, hidden_dropout=0.0, attention_dropout=0.0, apply_rope_fusion=False,
        persist_layer_norm=False, **{f"{name}_fusion": False for name in fusions},
    )  # fmt: skip
    provider.finalize()
    model, ids = provider.provide(pre_process=True, post_process=True), torch.arange(16).view(1, -1)
    model(ids, ids, None, labels=ids).mean().backward()
    found = [fc.stats()]
    fc.reset_stats()
    with torch.no_grad():
        for _ in range(2):
            model.eval()(ids, ids, None)
    return [*found, fc.stats()]


def test_a_model_of_its_provider_is_compressed() -> None:
    for training, evaluation in spawn(provided, 2, seconds=200):
        assert training["calls"] == training["quantized"] == 8 and not training["deferred"]
        assert evaluation["quantized"] == 8
        assert evaluation["feedback"] == {"this forward measures": 4, "on": 4}
