"""Shapes of models: built-in names, or the config.json of a Hugging Face checkpoint.

Only dense decoders are known: what tensor parallelism sends and computes follows from seven numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = 2  # of a bf16 weight or activation
SUMS_PER_LAYER = 2  # after attention and after the MLP

# model_type of config.json -> matrices of its MLP: 3 where a gate multiplies, 2 otherwise
MLP_MATRICES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "glm", "olmo2", "granite"), 3),
    **dict.fromkeys(("gpt2", "gpt_neox", "opt", "bloom", "falcon", "starcoder2"), 2),
}


@dataclass(frozen=True)
class Model:
    """A dense decoder."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int = 0  # 0: hidden / heads
    mlp_matrices: int = 3

    @property
    def dim(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        attention = self.hidden * self.dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.mlp_matrices * self.hidden * self.ffn

    @property
    def weights(self) -> int:
        """Parameters, with separate embedding and output matrices."""
        return self.layers * self.layer_weights + 2 * self.vocab * self.hidden

    @property
    def sums(self) -> int:
        """Tensor-parallel all-reduces of one forward."""
        return SUMS_PER_LAYER * self.layers

    def prefill_operations(self, batch: int, seq: int) -> float:
        """Floating-point operations of one forward over the prompt: matrices, causal attention, one row of logits."""
        matrices = 2 * self.layers * self.layer_weights * batch * seq
        attention = 2 * self.layers * batch * seq * seq * self.heads * self.dim
        return matrices + attention + 2 * self.vocab * self.hidden * batch

    def cache_bytes(self, batch: int, seq: int) -> int:
        """Keys and values of ``batch`` sequences of ``seq`` tokens in bf16."""
        return 2 * self.layers * batch * seq * self.kv_heads * self.dim * BYTES


# From the config.json that each checkpoint is published with; gpt-3-175b from arXiv 2005.14165, table 2.1.
MODELS = {
    model.name: model
    for model in (
        Model("llama-2-7b", 32, 4096, 32, 32, 11008, 32000),
        Model("llama-2-13b", 40, 5120, 40, 40, 13824, 32000),
        Model("llama-2-70b", 80, 8192, 64, 8, 28672, 32000),
        Model("llama-3-8b", 32, 4096, 32, 8, 14336, 128256),
        Model("llama-3-70b", 80, 8192, 64, 8, 28672, 128256),
        Model("llama-3.1-405b", 126, 16384, 128, 8, 53248, 128256),
        Model("mistral-7b", 32, 4096, 32, 8, 14336, 32000),
        Model("mistral-nemo-12b", 40, 5120, 32, 8, 14336, 131072, head_dim=128),
        Model("qwen2.5-72b", 80, 8192, 64, 8, 29568, 152064),
        Model("qwen3-32b", 64, 5120, 64, 8, 25600, 151936, head_dim=128),
        Model("gemma-2-27b", 46, 4608, 32, 16, 36864, 256000, head_dim=128),
        Model("gpt-3-175b", 96, 12288, 96, 96, 49152, 50257, mlp_matrices=2),
    )
}


def model(name: str) -> Model:
    """A built-in model, or the one whose config.json (or its folder) ``name`` is the path of. ValueError otherwise."""
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return read(path)
    raise ValueError(f"--model {name}: choose {', '.join(MODELS)}, or the path of a Hugging Face config.json.")


def read(path: Path) -> Model:
    """The model of a Hugging Face config.json; ValueError with a sentence if it is none or not a dense decoder."""
    config = json_object(path)
    config = config.get("text_config", config)  # multimodal checkpoints
    kind = config.get("model_type")
    if kind not in MLP_MATRICES:
        raise ValueError(f"{path}: model_type {kind!r} is not a dense decoder known here: {', '.join(MLP_MATRICES)}.")
    heads = _number(path, config, "num_attention_heads", "n_head")
    hidden = _number(path, config, "hidden_size", "n_embd")
    return Model(
        str(config.get("_name_or_path") or path.parent.name or path),
        _number(path, config, "num_hidden_layers", "n_layer"),
        hidden,
        heads,
        _number(path, config, "num_key_value_heads", default=heads),
        _number(path, config, "intermediate_size", "n_inner", default=4 * hidden),
        _number(path, config, "vocab_size"),
        _number(path, config, "head_dim", default=hidden // heads),
        MLP_MATRICES[kind],
    )


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; ValueError with a sentence if it is no object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}.")
    return found


def _number(path: Path, config: dict[str, Any], *names: str, default: int | None = None) -> int:
    """The first of ``names`` that is set, or the default; ValueError if there is none or it is no positive integer."""
    found = next((config[name] for name in names if config.get(name) is not None), default)
    if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
        raise ValueError(f"{path}: {' or '.join(names)} should be a positive integer, found {found!r}.")
    return found
