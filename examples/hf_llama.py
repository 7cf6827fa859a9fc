"""A LLaMA-architecture checkpoint as a tensor-parallel Megatron-Core GPTModel, and back.

Megatron keeps q, k and v in one matrix, interleaved by key/value group, and gate and up in another; ``fuse`` and
``unfuse`` go between the two layouts on one rank's shard.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hf_checkpoint import EMBEDDING, HEAD, NORM, SPLIT, Checkpoint, Shape, config_json, layer_tensor
from safetensors.torch import save_file
from torch import Tensor

from flashcomm_megatron import cpu

# Weights of a layer that only change their name: Hugging Face's to Megatron's.
SAME = {
    "input_layernorm": "input_layernorm",
    "self_attn.o_proj": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.down_proj": "mlp.linear_fc2",
}
QKV, GATE_UP = "self_attention.linear_qkv", "mlp.linear_fc1"
# Weights outside the layers.
OUTSIDE = {
    EMBEDDING: ("embedding.word_embeddings.weight", 0),
    NORM: ("decoder.final_layernorm.weight", None),
    HEAD: ("output_layer.weight", 0),
}


def build(shape: Shape, world: int, dtype: torch.dtype, init_std: float | None = None) -> Any:
    """A GPTModel sharded over ``world`` ranks, with random weights of deviation ``init_std`` or none worth keeping."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=world,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=init_std is not None,
        init_method_std=init_std or 0.02,
    )
    model = GPTModel(
        config,
        cpu.layer_spec(config),
        vocab_size=-(-shape.vocab // world) * world,
        max_sequence_length=shape.context,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rope_scaling=shape.rope_factor is not None,
        rope_scaling_factor=shape.rope_factor or 1.0,
        share_embeddings_and_output_weights=shape.tied,
    )
    return model.to(dtype=dtype)  # torch's norms are born float32


@torch.no_grad()
def load(model: Any, file: Checkpoint, shape: Shape, rank: int, world: int) -> None:
    """Fill rank's shard of ``model``; rows that pad the vocabulary become 0."""
    parameters = dict(model.named_parameters())
    for name, (megatron, split) in OUTSIDE.items():
        if megatron in parameters:
            parameters[megatron].zero_()
            part = file.read(name, split, rank, world)
            parameters[megatron][: len(part)].copy_(part)
    for layer in range(shape.layers):
        parts = {name: file.read(layer_tensor(layer, name), split, rank, world) for name, split in SPLIT.items()}
        for megatron, part in fuse(parts, shape.head_dim).items():
            parameters[f"decoder.layers.{layer}.{megatron}.weight"].copy_(part)


def save(model: Any, folder: Path, shape: Shape, rank: int, world: int, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors (in ``dtype``) from all shards; every rank calls, rank 0 writes."""
    state = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    tensors = {name: _gather(state[own], split, world) for name, (own, split) in OUTSIDE.items() if own in state}
    for layer in range(shape.layers):
        prefix = f"decoder.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for name, part in unfuse(own, shape.heads // shape.kv_heads, shape.head_dim).items():
            tensors[layer_tensor(layer, name)] = _gather(part, SPLIT[name], world)
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            tensors[name] = tensors[name][: shape.vocab]
    if rank == 0:
        (folder / "config.json").write_text(json.dumps(config_json(shape, dtype), indent=2) + "\n")
        tensors = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def fuse(parts: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """A layer's shard by Hugging Face's names as Megatron's weights: for each key/value head its queries, then k, v."""
    width = parts["self_attn.q_proj"].shape[1]
    groups = len(parts["self_attn.k_proj"]) // head_dim
    qkv = [parts[f"self_attn.{name}_proj"].reshape(groups, -1, width) for name in "qkv"]
    fused = {megatron: parts[name] for name, megatron in SAME.items()}
    fused[QKV] = torch.cat(qkv, dim=1).reshape(-1, width)
    fused[GATE_UP] = torch.cat([parts["mlp.gate_proj"], parts["mlp.up_proj"]])
    return fused


def unfuse(state: dict[str, Tensor], queries: int, head_dim: int) -> dict[str, Tensor]:
    """The inverse of :func:`fuse`, for ``queries`` query heads to a key/value head; ``state`` names end in .weight."""
    parts = {name: state[f"{megatron}.weight"] for name, megatron in SAME.items()}
    qkv = state[f"{QKV}.weight"]
    split = qkv.view(-1, (queries + 2) * head_dim, qkv.shape[1]).split([queries * head_dim, head_dim, head_dim], dim=1)
    for name, value in zip("qkv", split, strict=True):
        parts[f"self_attn.{name}_proj"] = value.reshape(-1, qkv.shape[1])
    parts["mlp.gate_proj"], parts["mlp.up_proj"] = state[f"{GATE_UP}.weight"].chunk(2)
    return parts


def _gather(part: Tensor, split: int | None, world: int) -> Tensor:
    if split is None:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, split)
