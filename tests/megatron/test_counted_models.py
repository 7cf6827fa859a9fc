"""Models with gathers and sums that stay exact: each is counted by its name, as often as it happens, and nothing else.

Real Megatron-Core models on two ranks over gloo, sequence parallel, on the stand-in for Transformer Engine. What their
other layers send is compressed.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from mixtures import Recorder, calls, recorded
from ranks import once, tensor_parallel
from torch import nn

import flashcomm_megatron as fc

# Not imported here: the ranks import this file before they put the stand-in where Megatron finds it.
pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

WORLD = 2
CONFIG = fc.Config(bits=4, min_bytes=0)
LATENT = {"multi_latent_attention": True, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 16,
          "qk_pos_emb_head_dim": 8, "v_head_dim": 16, "rope_type": "rope", "apply_rope_fusion": False}  # fmt: skip
INDEXER = {"experimental_attention_variant": "dsa", "dsa_indexer_n_heads": 2, "dsa_indexer_head_dim": 16,
           "dsa_indexer_topk": 8, "dsa_indexer_loss_coeff": 0.1}  # fmt: skip
LINEAR = {"no_op": False, "replace_with_linear": True}
REPLACED = {"attention": {"n_heads_in_group": None, **LINEAR}, "mlp": {"ffn_hidden_size": None, **LINEAR}}


def everything(rank: int, world: int) -> dict[str, Any]:
    """What one rank sees of every model."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "stand_ins" / "transformer_engine"))
    tensor_parallel(world, scripts=True)
    return {"sparse attention": step(sparse_attention()), "replaced": step(replaced()), "padded": padded(),
            "fused shared experts": fused_shared_experts(), "last dimensions": last_dimensions()}  # fmt: skip


seen = once(everything, WORLD, seconds=200)


def step(model: Any, training: bool = True) -> dict[str, Any]:
    """What a step compressed in forward, and what it deferred."""
    ids, recorder = torch.arange(mixtures.TOKENS).view(1, -1), Recorder(model.train(training))
    fc.reset_stats()
    with recorded(recorder, CONFIG), torch.set_grad_enabled(training):
        loss = model(ids, ids, None, labels=ids)
        forward = list(recorder.forward)
        if training:
            loss.mean().backward()
    return {"forward": forward, "deferred": fc.stats()["deferred"], "finite": bool(loss.isfinite().all())}


def gpt(config: Any, spec: Any) -> Any:
    from megatron.core.models.gpt import GPTModel

    return GPTModel(config, spec, mixtures.VOCABULARY, mixtures.TOKENS, position_embedding_type="rope")


# ---- sparse attention: an indexer, and attention on absorbed latents ------------------------------------------------


def sparse_attention() -> Any:
    """DeepSeek's sparse attention; from 0.19 on over absorbed latents."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_dsa_module_spec_for_backend
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.experimental_attention_variant import dsa
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    dsa.rotate_activation = lambda x: x  # by a CUDA kernel
    config = MLATransformerConfig(**mixtures.BASE, **LATENT, **INDEXER)
    layer = get_gpt_layer_with_transformer_engine_spec(multi_latent_attention=True)
    layer.submodules.input_layernorm = WrappedTorchNorm
    layer.submodules.self_attention = get_dsa_module_spec_for_backend(config, TESpecProvider())
    core = layer.submodules.self_attention.submodules.core_attention
    core.submodules.indexer.submodules.k_norm = WrappedTorchNorm
    spec = TransformerBlockSubmodules([layer] * config.num_layers, layer_norm=WrappedTorchNorm)
    return gpt(config, spec)


def test_sparse_attention(seen: list[dict[str, Any]]) -> None:
    absorbed = find_spec("megatron.core.transformer.experimental_attention_variant.absorbed_mla") is not None
    for rank in (each["sparse attention"] for each in seen):
        found = rank["deferred"]
        # In each of two layers: the indexer's input and query; the position key, and from 0.19 on the latents.
        assert found == {"DSA indexer": 4} | (
            {"absorbed latent attention": 4} if absorbed else {"latent attention's position key": 2}
        )
        assert [layer for _, layer in rank["forward"] if layer.endswith(("linear_proj", "linear_fc2"))] == [
            "0.self_attention.linear_proj", "0.mlp.linear_fc2", "1.self_attention.linear_proj", "1.mlp.linear_fc2",
        ]  # fmt: skip
        assert rank["finite"]


# ---- gathers along the last dimension -------------------------------------------------------------------------------


def last_dimensions() -> list[dict[str, int]]:
    """What Megatron's own latent attention, token prediction and a column layer that gathers its output deferred."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(**mixtures.BASE, **LATENT)
    latent = step(gpt(config, get_gpt_decoder_block_spec(config, use_transformer_engine=False)))
    predicting = step(mixtures.token_prediction())
    column = ColumnParallelLinear(64, 64, config=config, init_method=nn.init.ones_, gather_output=True, bias=False,
                                  skip_bias_add=False)  # fmt: skip
    column.sequence_parallel = False
    fc.reset_stats()
    with fc.flashcomm(CONFIG):
        column(torch.ones(8, 1, 64))
    return [latent["deferred"], predicting["deferred"], fc.stats()["deferred"]]


def test_gathers_along_the_last_dimension(seen: list[dict[str, Any]]) -> None:
    for latent, predicting, column in (each["last dimensions"] for each in seen):
        # In each of two layers: the latents of queries, and those of keys and values.
        assert latent == {"latent attention's last dimension": 4}
        assert predicting == {"token prediction's last dimension": 1}
        assert column == {"gathered output of a column layer": 1}


# ---- heterogeneous blocks -------------------------------------------------------------------------------------------


def replaced() -> Any:
    """A model whose second layer is two linear replacements.

    Not sequence parallel: there Megatron pads the first dimension instead of the last and fails.
    """
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    usual = {"attention": {"n_heads_in_group": 1, "no_op": False, "replace_with_linear": False},
             "mlp": {"ffn_hidden_size": 96, "no_op": False, "replace_with_linear": False}}  # fmt: skip
    config = HeterogeneousTransformerConfig(
        **mixtures.BASE | {"sequence_parallel": False},
        heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": [usual, REPLACED]}),
    )
    return gpt(config, get_gpt_heterogeneous_layer_spec(config, use_te=False))


def test_heterogeneous_replacements(seen: list[dict[str, Any]]) -> None:
    for rank in (each["replaced"] for each in seen):
        assert rank["deferred"] == {"heterogeneous replacement": 2}
        assert rank["forward"] == calls([("0.", *mixtures.ATTENTION), ("0.", *mixtures.DENSE)], None, "all_reduce")
        assert rank["finite"]


# ---- layers padded for FP8 ------------------------------------------------------------------------------------------


def padded() -> dict[str, Any]:
    """Inference of a model whose layers gather and sum outside of themselves."""
    from megatron.core.fp8_utils import prepare_model_for_fp8_inference
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    model = prepare_model_for_fp8_inference(mixtures.transformer_engine(sequence_parallel=True))
    FP8GlobalStateManager.is_fp8_enabled = staticmethod(lambda: True)
    return step(model, training=False)


def test_padded_layers(seen: list[dict[str, Any]]) -> None:
    for rank in (each["padded"] for each in seen):
        assert rank["deferred"] == {"FP8-padded inference": 8}  # four layers, each gathers or sums
        assert rank["finite"]


# ---- fused shared experts -------------------------------------------------------------------------------------------


def fused_shared_experts() -> list[tuple[int, dict[str, int], float]] | None:
    """Without and with sequence parallelism: calls compressed and deferred, and the error; None before 0.19.

    The kernel is played by the weights of the module's own linear layers.
    """
    from megatron.core.transformer.moe import shared_experts

    kind = getattr(shared_experts, "FusedSharedExpertMLP", None)
    if kind is None:
        return None
    kind._validate_fused_grouped_swiglu = lambda self: None
    kind._fused_grouped_swiglu_no_comm = lambda self, x: (
        nn.functional.silu(x @ self.linear_fc1.weight.t()) @ self.linear_fc2.weight.t()
    )
    return [around(kind, parallel) for parallel in (False, True)]


def around(kind: Any, sequence_parallel: bool) -> tuple[int, dict[str, int], float]:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    shared = {"num_moe_experts": 4, "moe_shared_expert_intermediate_size": 32}
    config = TransformerConfig(**mixtures.BASE | {"sequence_parallel": sequence_parallel}, **shared)
    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    module = kind(config, layers, False, ProcessGroupCollection.use_mpu_process_groups())
    x = torch.randn(8, 1, mixtures.HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    exact = module(x)
    fc.reset_stats()
    with fc.flashcomm(CONFIG):
        found = module(x)
        found.sum().backward()
    return fc.stats()["quantized"], fc.stats()["deferred"], ((found - exact).norm() / exact.norm()).item()


def test_fused_shared_experts_are_compressed(seen: list[dict[str, Any]]) -> None:
    for rank in (each["fused shared experts"] for each in seen):
        if rank is None:
            pytest.skip("this Megatron-Core has no fused shared experts")
        for (quantized, deferred, error), expected in zip(rank, (1, 4), strict=True):
            # The sum; under sequence parallelism the gather as well, and both again in backward.
            assert quantized == expected and deferred == {} and 0 < error < 0.2
