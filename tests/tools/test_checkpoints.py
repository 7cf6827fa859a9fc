"""Checkpoints as users have them: no begin or end of text, contexts of 131072, head counts that few sizes divide."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_generate import OWN, ROOT, argued, broken, generate, hf_checkpoint
from tokenizers import Tokenizer

import flashcomm_megatron as fc


def test_a_model_without_bos_or_eos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    folder = broken(tmp_path, bos_token_id=None, eos_token_id=None)
    args = argued("--model", str(folder), "--prompt", "def f(", "--perplexity", f"{OWN}/held-out.txt")
    job = generate.prepare(args)
    with_bos = generate.prepare(argued("--prompt", "def f(", "--perplexity", f"{OWN}/held-out.txt"))
    assert [job.shape.bos, *job.prompt] == [None, *with_bos.prompt[1:]] and job.shape.eos == ()
    assert job.documents[0][:50] == with_bos.documents[0][1:51]


def test_a_template_surrounds_the_prompt_and_brings_its_own_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    begin = Tokenizer.from_file(f"{OWN}/tokenizer.json").id_to_token(hf_checkpoint.read_shape(Path(OWN), 1).bos)
    job = generate.prepare(argued("--prompt", "x = 1", "--template", f"{begin}# code\\n{{}}\\n"))
    plain = generate.prepare(argued("--prompt", "# code\nx = 1\n"))
    assert job.prompt == plain.prompt


def test_a_declared_context_sizes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text becomes windows that memory can hold, documents their beginnings."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    folder = broken(tmp_path, max_position_embeddings=131072)
    text = tmp_path / "long.txt"
    text.write_text("def f(x): return x + 1\n" * 2000)
    words = ["--model", str(folder), "--perplexity", str(text), "--prompt", "def f("]
    job = generate.prepare(argued(*words, "--max-documents", "5"))
    assert [len(tokens) for tokens in job.documents] == [1024] * 5
    whole = [token for tokens in job.documents for token in tokens]
    assert whole == generate.encode(job.tokenizer, job.shape, text.read_text().strip())[: len(whole)]
    short = generate.prepare(argued(*words, "--window", "100"))
    assert {len(tokens) for tokens in short.documents[:-1]} == {100}

    import convert_hf_llama

    words = ["--model", str(folder), "--save", "x"]
    assert convert_hf_llama.arguments().parse_args(words).seq_length is None
    saved = convert_hf_llama.megatron_arguments(job.shape, min(job.shape.context, convert_hf_llama.SEQUENCE))
    assert (saved.seq_length, saved.max_position_embeddings) == (4096, 131072)


def test_compare_alone_switches_another_recipe_on() -> None:
    """Its widths are widths; --flash-comm-bits need not be said a second time."""
    try:
        args = generate.parse(["--compare", "16,8,4", "--flash-comm-recipe", "flash-v1"])
        widths = generate.configurations(args)
        assert widths[16] is None
        assert [(widths[bits].bits, widths[bits].recipe) for bits in (8, 4)] == [(8, "flash-v1"), (4, "flash-v1")]
        assert generate.parse(["--flash-comm-bits", "6", "--compare", "16,8"]).flash_comm_bits == 6
    finally:
        fc.disable()


def test_exact_means_16_bits_unless_asked_otherwise() -> None:
    assert generate.dtype(argued()) == torch.bfloat16
    assert generate.dtype(argued("--dtype", "float32")) == torch.float32


@pytest.mark.parametrize(("kv_heads", "printed"), [(4, "2"), (1, "1")])
def test_the_demo_asks_how_many_ranks_can_share_a_model(
    kv_heads: int, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf_checkpoint.py", str(broken(tmp_path, num_key_value_heads=kv_heads))])
    hf_checkpoint.main()
    assert capsys.readouterr().out == f"{printed}\n"
    recipe = subprocess.run(
        ["make", "-n", "demo", "MODEL=folder"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--nproc-per-node $(.venv/bin/python examples/hf_checkpoint.py folder)" in recipe.stdout
