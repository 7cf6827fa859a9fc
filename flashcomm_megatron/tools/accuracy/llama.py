"""A LLaMA checkpoint in plain torch, cut for any number of tensor-parallel ranks, with the sums left to the caller.

Only what the accuracy lab needs: float32, Hugging Face layout (config.json, model*.safetensors, tokenizer.json), and at
every row-parallel layer the list of partial sums that the ranks would hold. Whoever calls decides how they are added.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

Sum = Callable[[str, list[Tensor]], Tensor]  # (site, partial sums [batch, tokens, hidden] by rank) -> their sum
Cache = dict[int, tuple[Tensor, Tensor]]  # layer -> keys, values [batch, kv heads, tokens, head dim]
REFUSED = ("attention_bias", "mlp_bias", "rope_scaling")


class Llama:
    """``model(tokens, world, add)`` computes logits as ``world`` ranks would. ValueError for what is no plain LLaMA."""

    def __init__(self, folder: str) -> None:
        safetensors = _needs("safetensors.torch")
        path = Path(folder)
        if not (path / "config.json").exists():
            raise ValueError(f"--model {folder}: no config.json there; give the folder of a Hugging Face checkpoint.")
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        refused = [name for name in REFUSED if self.config.get(name)]
        if self.config.get("model_type") != "llama" or refused:
            found = f"model_type {self.config.get('model_type')}" + "".join(f", {name}" for name in refused)
            raise ValueError(f"--model {folder}: expected a plain LLaMA, found {found}.")
        weights = {}
        for file in sorted(path.glob("model*.safetensors")):
            weights.update(safetensors.load_file(file))
        self.weights = {name.removeprefix("model."): each.float() for name, each in weights.items()}
        self.layers = int(self.config["num_hidden_layers"])
        self.heads = int(self.config["num_attention_heads"])
        self.kv_heads = int(self.config.get("num_key_value_heads", self.heads))
        self.width = int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)
        self.context = int(self.config["max_position_embeddings"])
        rope = self.config.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"--model: rotary embedding of type {rope['rope_type']}; only default is known.")
        self.theta = float(rope.get("rope_theta") or self.config.get("rope_theta", 10000.0))
        self.rotations = _rotations(self.width, 0, self.theta)

    @property
    def sites(self) -> list[str]:
        """The row-parallel layers, in execution order."""
        return [f"layers.{i}.{name}" for i in range(self.layers) for name in ("self_attn.o_proj", "mlp.down_proj")]

    @property
    def rank_counts(self) -> list[int]:
        """The tensor-parallel sizes that can share attention heads, key/value heads and MLP features."""
        shared = math.gcd(self.heads, self.kv_heads, int(self.config["intermediate_size"]))
        return [count for count in range(1, shared + 1) if shared % count == 0]

    def __call__(self, tokens: Tensor, world: int, add: Sum, cache: Cache | None = None) -> Tensor:
        """Logits [batch, tokens, vocabulary] of int64 ``tokens`` [batch, tokens] that follow what ``cache`` holds."""
        hidden = self.weights["embed_tokens.weight"][tokens]
        for layer in range(self.layers):
            for site, branch in (("self_attn.o_proj", self._attention), ("mlp.down_proj", self._mlp)):
                inside, name = branch(layer, hidden, cache), f"layers.{layer}.{site}"
                columns = zip(inside.chunk(world, -1), self.weights[f"{name}.weight"].chunk(world, 1), strict=True)
                hidden = hidden + add(name, [linear(x, weight) for x, weight in columns])
        head = self.weights.get("lm_head.weight", self.weights["embed_tokens.weight"])
        return linear(self._norm(hidden, "norm"), head)

    def _attention(self, layer: int, hidden: Tensor, cache: Cache | None) -> Tensor:
        """Attention before its output projection."""
        x, name = self._norm(hidden, f"layers.{layer}.input_layernorm"), f"layers.{layer}.self_attn"
        projected = (linear(x, self.weights[f"{name}.{each}_proj.weight"]) for each in "qkv")
        query, key, value = (each.view(*each.shape[:2], -1, self.width).transpose(1, 2) for each in projected)
        start = cache[layer][0].size(2) if cache and layer in cache else 0
        query, key = self._rotate(query, start), self._rotate(key, start)
        if cache is not None:
            if start:
                key, value = torch.cat([cache[layer][0], key], 2), torch.cat([cache[layer][1], value], 2)
            cache[layer] = key, value
        out = scaled_dot_product_attention(query, key, value, is_causal=start == 0, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    def _mlp(self, layer: int, hidden: Tensor, cache: Cache | None) -> Tensor:
        """The gated product before its down projection."""
        x, name = self._norm(hidden, f"layers.{layer}.post_attention_layernorm"), f"layers.{layer}.mlp"
        gate, up = (linear(x, self.weights[f"{name}.{each}_proj.weight"]) for each in ("gate", "up"))
        return silu(gate) * up

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotary embedding, half-split, of [batch, heads, tokens, width] whose first token stands at ``start``."""
        end = start + x.size(2)
        if len(self.rotations[0]) < end:  # grown as needed: a context of 131072 tokens is declared, never used up
            self.rotations = _rotations(self.width, 2 * end, self.theta)
        cosine, sine = (each[start : start + x.size(2)] for each in self.rotations)
        first, second = x.chunk(2, -1)
        return x * cosine + torch.cat([-second, first], -1) * sine

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + float(self.config["rms_norm_eps"]))
        weight: Tensor = self.weights[f"{name}.weight"]
        return x * scale * weight


def windows(folder: str, text: str, model: Llama, length: int, count: int) -> Tensor:
    """``count`` windows of ``length`` tokens, int64, each BOS (where the model has one) and text.

    A file with ``<|endoftext|>`` gives the beginning of each document that is long enough, any other file consecutive
    pieces. ValueError if there are too few.
    """
    tokenizer = _needs("tokenizers").Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    documents = [each.strip() for each in Path(text).read_text().split("<|endoftext|>") if each.strip()]
    bos = model.config.get("bos_token_id")
    head = [] if bos is None else [int(bos)]
    taken, rows = length - len(head), []
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False).ids
        starts = range(0, len(ids), taken) if len(documents) == 1 else (0,)
        rows += [[*head, *ids[start : start + taken]] for start in starts]
    rows = [row for row in rows if len(row) == length]
    if len(rows) < count:
        raise ValueError(f"--text {text}: {len(rows)} windows of {length} tokens, {count} wanted; lower --sequences.")
    return torch.tensor(rows[:count])


def _rotations(width: int, length: int, theta: float) -> tuple[Tensor, Tensor]:
    frequencies = theta ** -(torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _needs(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise ValueError(f"the accuracy lab needs {package}: run pip install {package}.") from None
