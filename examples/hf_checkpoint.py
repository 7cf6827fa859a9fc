"""A LLaMA-architecture model as a Hugging Face directory: config.json, weights in safetensors, tokenizer.json.

:func:`read_shape` and :class:`Checkpoint` check, before any rank has to wait for another, all that can be checked: the
architecture, whether ranks can share it, the name and shape of every tensor. What is wrong they say in one sentence.
Weights are read slice by slice: ``SPLIT`` says along which dimension tensor-parallel ranks share each of them.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Dimension along which ranks share each weight of a layer; None: every rank holds all of it.
SPLIT = {
    "input_layernorm": None,
    "self_attn.q_proj": 0,
    "self_attn.k_proj": 0,
    "self_attn.v_proj": 0,
    "self_attn.o_proj": 1,
    "post_attention_layernorm": None,
    "mlp.gate_proj": 0,
    "mlp.up_proj": 0,
    "mlp.down_proj": 1,
}
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class ModelError(ValueError):
    """A directory that cannot be run as asked; the message is one sentence for the user."""


class Shape(NamedTuple):
    """What config.json says about the model."""

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    eps: float
    rope_theta: float
    rope_factor: float | None  # LLaMA 3's scaling, or None
    tied: bool
    bos: int | None  # None: the model has none
    eos: tuple[int, ...]


def read_shape(folder: Path, world: int) -> Shape:
    """The model in ``folder``; ModelError if it is not a LLaMA or ``world`` ranks cannot share its heads."""
    shape = _shape(folder, _read_config(folder))
    allowed = rank_counts(shape)
    if world not in allowed:
        raise ModelError(
            f"{world} ranks cannot share the {shape.heads} attention heads, {shape.kv_heads} key/value heads and "
            f"{shape.ffn} MLP features of {folder}: start {' or '.join(map(str, allowed))}."
        )
    return shape


def rank_counts(shape: Shape) -> list[int]:
    """The numbers of ranks that divide attention heads, key/value heads and MLP features alike."""
    shared = math.gcd(shape.heads, shape.kv_heads, shape.ffn)
    return [count for count in range(1, shared + 1) if shared % count == 0]


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"There is no model directory {folder}.")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}: give a Hugging Face model directory.")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON: {error}.") from None
    wanted = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in wanted.items():
        found = config.get(name, None if name == "model_type" else value)
        if found != value:
            raise ModelError(f"{folder} has {name} {found!r}: only LLaMA models ({name} {value!r}) can be loaded.")
    return config


def _shape(folder: Path, config: dict[str, Any]) -> Shape:
    try:
        heads, eos = config["num_attention_heads"], config.get("eos_token_id", 2)
        theta, factor = _rope(folder, config)
        return Shape(
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            context=config["max_position_embeddings"],
            eps=config["rms_norm_eps"],
            rope_theta=theta,
            rope_factor=factor,
            tied=config.get("tie_word_embeddings", False),
            bos=config.get("bos_token_id", 1),
            eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'} lacks {error.args[0]}: is it a LLaMA model?") from None


def _rope(folder: Path, config: dict[str, Any]) -> tuple[float, float | None]:
    """Base of the rotary frequencies and LLaMA 3's scaling factor; Megatron fixes that scaling's other constants."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(rope.get(name) == value for name, value in fixed.items()):
        return theta, rope["factor"]
    raise ModelError(f"{folder} scales rotary positions in a way Megatron's LLaMA does not know: {rope}.")


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every tensor the checkpoint must hold."""
    table = (shape.vocab, shape.hidden)
    names: dict[str, tuple[int, ...]] = {EMBEDDING: table, NORM: (shape.hidden,)}
    for layer in range(shape.layers):
        names |= {layer_tensor(layer, name): full for name, full in _layer_shapes(shape).items()}
    return names if shape.tied else names | {HEAD: table}


def layer_tensor(layer: int, name: str) -> str:
    """Full name of a weight of ``SPLIT`` in layer 0, 1, ..."""
    return f"model.layers.{layer}.{name}.weight"


def _layer_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "input_layernorm": (shape.hidden,),
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "post_attention_layernorm": (shape.hidden,),
        "mlp.gate_proj": (shape.ffn, shape.hidden),
        "mlp.up_proj": (shape.ffn, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ffn),
    }


class Checkpoint:
    """The weights in ``folder``; ModelError names a file or tensor that is missing, unreadable or misshapen."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self._file_of: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read: {error}.") from None
            self._file_of |= dict.fromkeys(file.keys(), file)
        for name, full in tensor_shapes(shape).items():
            if name not in self._file_of:
                raise ModelError(f"{folder} has no tensor {name}: the checkpoint is incomplete.")
            found = self._file_of[name].get_slice(name).get_shape()
            if tuple(found) != full:
                raise ModelError(f"{folder}: {name} is {found}, but config.json makes it {list(full)}.")

    def read(self, name: str, split: int | None, rank: int, world: int) -> Tensor:
        """Rank's slice of a tensor along dimension ``split``; the last one is short if ``world`` does not divide it."""
        stored = self._file_of[name].get_slice(name)
        if split is None:
            return stored[:]
        total = stored.get_shape()[split]
        size = -(-total // world)
        part = slice(min(rank * size, total), min((rank + 1) * size, total))
        return stored[part] if split == 0 else stored[:, part]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def config_json(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json for a model of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": shape.bos,
        "eos_token_id": shape.eos[0] if shape.eos else None,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tied,
    }


def main() -> None:
    """Print the smallest number of ranks above one that can share the model of sys.argv[1], or 1: for `make demo`."""
    try:
        counts = rank_counts(read_shape(Path(sys.argv[1]), 1))
    except ModelError as error:
        sys.exit(f"{error}")
    print(min(counts[1:], default=1))


if __name__ == "__main__":
    main()
