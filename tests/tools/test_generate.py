"""examples/generate.py: the model is the checkpoint, its text and perplexity are right, wrong input is refused.

The reference is LLaMA in plain torch, written from the architecture's description, with no cache and no parallelism.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import torch.nn.functional as F
from ranks import spawn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import generate  # noqa: E402
import hf_checkpoint  # noqa: E402
import hf_llama  # noqa: E402
import launch  # noqa: E402

import flashcomm_megatron as fc  # noqa: E402

PROMPT = "Tim and Sue went to the"
CONTINUED = " park with Mom. They saw a big slide and wanted to play on it."
DOCUMENTS = 12  # scored
# Logits of two float32 programs that sum in different orders, relative to the largest logit.
ROUNDING = 32 * torch.finfo(torch.float32).eps


# ---- the reference ----------------------------------------------------------------------------------------------


def reference(folder: Path, tokens: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] in float32."""
    config = json.loads((folder / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {name: value.float() for name, value in load_file(file).items()}
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[torch.tensor(tokens)]
    for layer in range(config["num_hidden_layers"]):
        own = {
            name.split(".")[-2]: value for name, value in weights.items() if name.startswith(f"model.layers.{layer}.")
        }
        x = x + attention(rms_norm(x, own["input_layernorm"], config), own, config)
        x = x + mlp(rms_norm(x, own["post_attention_layernorm"], config), own)
    return rms_norm(x, weights["model.norm.weight"], config) @ weights.get("lm_head.weight", embedding).T


def rms_norm(x: Tensor, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def mlp(x: Tensor, own: dict[str, Tensor]) -> Tensor:
    return (F.silu(x @ own["gate_proj"].T) * (x @ own["up_proj"].T)) @ own["down_proj"].T


def attention(x: Tensor, own: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    width = config["head_dim"]
    q, k, v = ((x @ own[f"{name}_proj"].T).view(len(x), -1, width).transpose(0, 1) for name in "qkv")
    q, k = rotate(q, config), rotate(k, config)
    queries = len(q) // len(k)
    k, v = k.repeat_interleave(queries, 0), v.repeat_interleave(queries, 0)
    scores = q @ k.transpose(1, 2) / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1) @ own["o_proj"].T


def rotate(x: Tensor, config: dict[str, Any]) -> Tensor:
    """Rotary positions, the first half of a head paired with the second."""
    half = x.shape[-1] // 2
    frequencies = config["rope_parameters"]["rope_theta"] ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    first, second = x.split(half, -1)
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, -1)


# ---- the model is the checkpoint's ------------------------------------------------------------------------------


def untied_model(folder: Path) -> Path:
    """A random model with its own output weights, in two files, whose vocabulary no even number of ranks can share."""
    folder.mkdir()
    shape = hf_checkpoint.Shape(
        vocab=101, hidden=32, ffn=48, layers=2, heads=8, kv_heads=2, head_dim=8, context=64, eps=1e-6,
        rope_theta=500.0, rope_factor=None, tied=False, bos=1, eos=(2,),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(3)
    full = hf_checkpoint.tensor_shapes(shape)
    tensors = {name: torch.randn(size, generator=draw) / size[-1] ** 0.5 for name, size in full.items()}
    names = list(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(hf_checkpoint.config_json(shape, torch.float32)))
    shutil.copy(generate.OWN_MODEL / "tokenizer.json", folder)
    return folder


def logits(rank: int, world: int, folders: list[Path], tokens: list[int]) -> list[tuple[Tensor, Tensor]]:
    """For every model: logits of all tokens at once, and one by one through the cache."""
    from megatron.core.inference.contexts import StaticInferenceContext

    ranks = launch.start()
    found = []
    for folder in folders:
        model, shape = loaded(folder, ranks)
        with torch.inference_mode():
            whole = generate.forward(model, tokens, 0, ranks)[:, : shape.vocab]
            context, steps = StaticInferenceContext(1, len(tokens)), []
            for feed in [tokens[:5], *([token] for token in tokens[5:])]:
                steps.append(
                    generate.forward(model, feed, context.sequence_len_offset, ranks, context)[:, : shape.vocab]
                )
                context.increment_sequence_len_offset(len(feed))
        found.append((whole.clone(), torch.cat(steps).clone()))
    return found


def loaded(folder: Path, ranks: launch.Ranks) -> tuple[Any, hf_checkpoint.Shape]:
    shape = hf_checkpoint.read_shape(folder, ranks.world)
    model = hf_llama.build(shape, ranks.world, torch.float32).eval()
    hf_llama.load(model, hf_checkpoint.Checkpoint(folder, shape), shape, ranks.rank, ranks.world)
    return model, shape


@pytest.mark.parametrize("world", [1, 2])
def test_logits_are_those_of_the_reference(world: int, shared_data: Path, tmp_path: Path) -> None:
    folders = [shared_data / "stories3M", generate.OWN_MODEL, untied_model(tmp_path / "untied")]
    tokens = torch.randint(3, 101, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    results = spawn(logits, world, folders, tokens, kind=forks.MEGATRON)
    for folder, (whole, steps) in zip(folders, results[0], strict=True):
        expected = reference(folder, tokens)
        size = expected.abs().max()
        assert (whole - expected).abs().max() / size < ROUNDING, folder
        assert (steps - expected[4:]).abs().max() / size < ROUNDING, folder
    for mine, theirs in zip(results[0], results[-1], strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1]), "ranks hold different logits"


# ---- text, perplexity, counters ---------------------------------------------------------------------------------


def argued(*words: str) -> Any:
    return generate.arguments().parse_args(words)


def widths(rank: int, world: int, model: Path, text: Path) -> dict[int, generate.Run]:
    """The runs of stories3M at 16, 8 and 4 bits, with every sum compressed."""
    os.environ["WORLD_SIZE"] = str(world)
    args = argued("--model", str(model), "--prompt", PROMPT, "--tokens", "16", "--perplexity", str(text))
    args.max_documents, args.compare, args.flash_comm_bits, args.flash_comm_min_bytes = DOCUMENTS, "16,8,4", 4, 0
    job = generate.prepare(args)
    ranks = launch.start()
    model_ = hf_llama.build(job.shape, world, torch.float32).eval()
    hf_llama.load(model_, job.weights, job.shape, rank, world)
    return {bits: generate.run(model_, job, config, args.tokens, ranks) for bits, config in job.widths.items()}


@pytest.fixture(scope="module")
def runs(shared_data: Path) -> list[dict[int, generate.Run]]:
    return spawn(widths, 2, shared_data / "stories3M", shared_data / "tinystories.txt", kind=forks.MEGATRON)


def test_text_and_perplexity_of_a_real_model(runs: list[dict[int, generate.Run]], shared_data: Path) -> None:
    exact, eight, four = (runs[0][bits] for bits in (16, 8, 4))
    assert exact.text == CONTINUED
    assert eight.text == CONTINUED
    assert re.fullmatch(r"[A-Za-z ,.!'\n\"]+", four.text)
    assert exact.perplexity == pytest.approx(reference_perplexity(shared_data), rel=ROUNDING)
    assert eight.perplexity == pytest.approx(exact.perplexity, rel=0.005)
    assert 0 < four.perplexity / exact.perplexity - 1 < 0.2


def reference_perplexity(shared_data: Path) -> float:
    """Of the same documents: BOS and text, cut at the context."""
    folder = shared_data / "stories3M"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    losses = []
    for text in (shared_data / "tinystories.txt").read_text().split("<|endoftext|>")[:DOCUMENTS]:
        tokens = [1, *tokenizer.encode(text.strip(), add_special_tokens=False).ids][:512]
        losses.append(F.cross_entropy(reference(folder, tokens[:-1]), torch.tensor(tokens[1:]), reduction="none"))
    return math.exp(torch.cat(losses).mean())


def test_all_ranks_report_the_same_text(runs: list[dict[int, generate.Run]]) -> None:
    for bits, run in runs[0].items():
        other = runs[1][bits]
        assert (run.text, run.perplexity) == (other.text, other.perplexity)


def test_bytes_of_every_sum_are_counted(runs: list[dict[int, generate.Run]]) -> None:
    """Two sums a layer, for each document scored and each token generated; 32 bits a value become 4 and metadata."""
    stats = runs[0][4].stats
    assert stats["quantized"] == stats["calls"] == 2 * 6 * DOCUMENTS
    assert 32 / 6 < stats["exact_bytes"] / stats["wire_bytes"] < 32 / 4
    assert runs[0][16].stats == {} and runs[0][16].sums > 0
    assert runs[0][4].generating["quantized"] == 2 * 6 * 16


# ---- what a user gets wrong -------------------------------------------------------------------------------------

OWN = str(generate.OWN_MODEL)


def broken(tmp_path: Path, **changes: Any) -> Path:
    """The shipped model with other entries in config.json."""
    folder = tmp_path / "broken"
    shutil.copytree(OWN, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without(tmp_path: Path, name: str) -> Path:
    """The shipped model without one tensor."""
    folder = broken(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    return folder


def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty.txt").write_text(" \n<|endoftext|>\n")
    return tmp_path / "empty.txt"


REFUSALS = {
    "wrong path": (lambda tmp: ["--model", "no/such/model"], 2, "There is no model directory no/such/model"),
    "no model": (lambda tmp: ["--model", str(tmp)], 2, "has no config.json"),
    "wrong bits": (
        lambda tmp: ["--flash-comm-bits", "4", "--compare", "16,9"],
        2,
        "--flash-comm-bits 9: choose 2 to 8",
    ),
    "no width": (lambda tmp: ["--compare", "few"], 2, "--compare few: give widths like 16,8,4"),
    "heads": (lambda tmp: [], 3, "3 ranks cannot share the 8 attention heads, 4 key/value heads"),
    "kv heads": (lambda tmp: [], 8, "8 ranks cannot share the 8 attention heads, 4 key/value heads"),
    "allowed sizes": (lambda tmp: [], 8, "start 1 or 2 or 4."),
    "nothing to continue": (
        lambda tmp: ["--model", str(broken(tmp, bos_token_id=None)), "--prompt", ""],
        2,
        "--prompt is empty and the model has no token that begins a text",
    ),
    "no text": (lambda tmp: ["--perplexity", "no/such.txt"], 2, "There is no text file no/such.txt"),
    "empty text": (lambda tmp: ["--perplexity", str(empty(tmp))], 2, "holds no text to score"),
    "missing tensor": (
        lambda tmp: ["--model", str(without(tmp, "model.layers.1.mlp.up_proj.weight"))],
        2,
        "has no tensor model.layers.1.mlp.up_proj.weight: the checkpoint is incomplete",
    ),
    "misshapen": (
        lambda tmp: ["--model", str(broken(tmp, intermediate_size=640))],
        2,
        "mlp.gate_proj.weight is [512, 256], but config.json makes it [640, 256]",
    ),
    "architecture": (lambda tmp: ["--model", str(broken(tmp, model_type="gpt2"))], 2, "has model_type 'gpt2'"),
    "bias": (lambda tmp: ["--model", str(broken(tmp, attention_bias=True))], 2, "has attention_bias True"),
    "positions": (
        lambda tmp: ["--model", str(broken(tmp, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}))],
        2,
        "scales rotary positions in a way",
    ),
    "long prompt": (lambda tmp: ["--prompt", "def f " * 300], 2, "do not fit into the model's context of 256"),
    "no tokens": (lambda tmp: ["--tokens", "0"], 2, "--tokens 0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_options_are_refused_before_ranks_start(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 2, before any rank is started; only one rank of a machine speaks."""
    words, world, sentence = REFUSALS[case]
    monkeypatch.setattr(generate, "start", lambda: pytest.fail("ranks were started"))
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    argv = ["generate.py", *words(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in ("1", "0"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as ended:
            generate.main()
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert (sentence in said and said.count("\n") == 1) if rank == "0" else said == ""
    fc.disable()


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_command_under_the_wrapper() -> None:
    """What ``torchrun -m flashcomm_megatron examples/generate.py`` prints, with the shipped model."""
    words = ["--tokens", "8", "--perplexity", f"{OWN}/held-out.txt", "--max-documents", "3", "--dtype", "bfloat16"]
    ran = forks.python("-m", "flashcomm_megatron", "examples/generate.py", *words, "--flash-comm-bits", "8", world=2)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("flash-comm: 8-bit auto") == 1
    table = dict(re.findall(r"^ *(16 \(exact\)|8) +([\d.]+) ", ran.stdout, re.M))
    assert float(table["8"]) == pytest.approx(float(table["16 (exact)"]), rel=0.02)
    assert ran.stdout.count("def ") == 2
    assert "scoring 3 documents" in ran.stdout


def test_a_mistake_ends_the_command_with_one_sentence() -> None:
    ran = forks.python("examples/generate.py", "--model", "no/such/model", world=2)
    assert ran.returncode != 0
    assert ran.stderr.count("generate.py: error: There is no model directory no/such/model.") == 1
    assert 'File "examples/' not in ran.stderr and 'examples/generate.py", line' not in ran.stderr
