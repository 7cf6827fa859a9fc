"""examples/train_tiny.py: documents, training on two ranks like on one, and a saved model that loads as it was."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from ranks import spawn
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import hf_checkpoint  # noqa: E402
import hf_llama  # noqa: E402
import launch  # noqa: E402
import train_tiny  # noqa: E402

SHIPPED = sorted(path for path in (ROOT / "examples" / "models").iterdir() if path.is_dir())
SOURCE = """'''A module.'''
import os

@first
@second(1)
def f():
    class Inner: pass

class C:
    def method(self): pass
async def g(): pass
"""


def test_pieces_are_whole_definitions() -> None:
    cut = train_tiny.pieces(SOURCE)
    assert [piece.split("\n")[0] for piece in cut] == ["'''A module.'''", "@first", "class C:", "async def g(): pass"]
    assert "".join(cut) == SOURCE.replace("\n\n@", "\n@").replace("\n\nclass C", "\nclass C")
    assert all(ast.parse(piece) for piece in cut)


def test_held_out_text_is_not_trained_on() -> None:
    train, held_out = set(train_tiny.documents(False)), train_tiny.documents(True)
    assert len(held_out) > 100 and len(train) > 10 * len(held_out)
    both = [text for text in held_out if text in train and len(text) > 300]
    assert len(both) <= len(held_out) // 50, "more than a few definitions stand in files of both kinds"


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [train_tiny.rate(step, 1000) for step in range(1001)]
    assert rates[99] == 1.0 and rates[0] == 0.01 and abs(rates[1000]) < 1e-12
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)


TOKENS = torch.arange(5000) * 3 % 50 + 3  # easy to learn


def trained(rank: int, world: int, folder: Path) -> tuple[float, Tensor, Tensor]:
    """Loss after three steps, logits, and logits of what was saved and loaded again."""
    ranks = launch.start()
    shape = train_tiny.SHAPE
    given = folder / "given"
    model = hf_llama.build(shape, world, torch.float32)
    hf_llama.load(model, hf_checkpoint.Checkpoint(given, shape), shape, rank, world)
    args = argparse.Namespace(steps=3, batch=2, peak_lr=3e-3, report_every=3)
    train_tiny.fit(model, TOKENS, TOKENS[:2000], ranks, args)
    loss = train_tiny.evaluate(model, TOKENS[:2000], ranks, batches=1)
    saved = folder / f"saved-{world}"
    saved.mkdir(exist_ok=True)
    hf_llama.save(model, saved, shape, rank, world, torch.float32)
    torch.distributed.barrier()
    again = hf_llama.build(shape, world, torch.float32)
    hf_llama.load(again, hf_checkpoint.Checkpoint(saved, shape), shape, rank, world)
    return loss, logits(model), logits(again)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = TOKENS[None, :32]
    return model(tokens, torch.arange(32)[None], None, runtime_gather_output=True)


def random_checkpoint(folder: Path) -> None:
    """Initial weights that do not depend on the number of ranks."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(3)
    full = hf_checkpoint.tensor_shapes(train_tiny.SHAPE)
    tensors = {
        name: torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, generator=draw)
        for name, size in full.items()
    }
    hf_llama.save_file(tensors, folder / "model.safetensors")


def test_two_ranks_train_like_one_and_save_what_they_trained(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "given")
    [(loss, one, one_again)] = spawn(trained, 1, tmp_path, kind=forks.MEGATRON)
    (loss_of_two, two, two_again), other = spawn(trained, 2, tmp_path, kind=forks.MEGATRON)
    assert torch.equal(one, one_again) and torch.equal(two, two_again)
    assert other[0] == loss_of_two
    # AdamW's first steps are the signs of gradients, so where those are rounding noise weights differ by 2 * peak_lr.
    assert loss_of_two == pytest.approx(loss, rel=1e-4)
    assert loss < 7.0, "log(2048) = 7.62 is what an untrained model reaches"


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_the_shipped_model_is_complete_and_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000
    config = json.loads((folder / "config.json").read_text())
    shape = hf_checkpoint.read_shape(folder, 2)
    assert hf_checkpoint.config_json(shape, torch.bfloat16) == config
    hf_checkpoint.Checkpoint(folder, shape)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(hf_checkpoint.tensor_shapes(shape))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == shape.vocab
    assert (tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")) == (shape.bos, shape.eos[0])
    assert (folder / "README.md").is_file()
