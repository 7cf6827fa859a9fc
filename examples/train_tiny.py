"""Train a tiny LLaMA with Megatron-Core, tensor parallel on CPUs, on text every machine has: Python's library.

    torchrun --nproc-per-node 2 examples/train_tiny.py --out examples/models/python-stdlib-3M
    ... --flash-comm-bits 4 --flash-comm-metrics runs/4.jsonl       compressed, with a file for the compare command

Every top-level definition of a source file, and what stands between two of them, is one document, so that the model can
be prompted with ``def ``. One file in twenty, chosen by a hash of its name, is held out. The result is a Hugging Face
directory: config.json, model.safetensors (bfloat16), tokenizer.json (byte-level BPE trained on the same text).
"""

from __future__ import annotations

import argparse
import math
import re
import sysconfig
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf_llama import Shape, build, save
from launch import Ranks, start, stop, world_size
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import flashcomm_megatron as fc

SPECIAL = ["<unk>", "<s>", "</s>"]  # 0, SHAPE.bos, SHAPE.eos
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"}
SHAPE = Shape(
    vocab=2048,
    hidden=256,
    ffn=512,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=32,
    context=256,
    eps=1e-5,
    rope_theta=10000.0,
    rope_factor=None,
    tied=True,
    bos=1,
    eos=(2,),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="Directory to write the model to.")
    parser.add_argument("--steps", type=int, default=3000, help="Optimizer steps.")
    parser.add_argument("--batch", type=int, default=8, help="Sequences of 256 tokens in a step.")
    parser.add_argument(
        "--peak-lr", type=float, default=3e-3, help="Learning rate after the warm-up; falls to 0 at the end."
    )
    parser.add_argument("--report-every", type=int, default=100, help="Steps between two held-out losses.")
    args = fc.add_arguments(parser).parse_args()
    ranks = start()
    tokenizer = shared_tokenizer(args.out, ranks)
    train, held_out = (tokens(tokenizer, documents(part)) for part in (False, True))
    say(
        ranks,
        f"{len(train):,} tokens to train on, {len(held_out):,} held out, {args.batch * SHAPE.context:,} in a step",
    )
    model = build(SHAPE, world_size(), torch.float32, init_std=0.02).to(ranks.device)
    fit(model, train, held_out, ranks, args)
    save(model, args.out, SHAPE, ranks.rank, ranks.world, torch.bfloat16)
    say(ranks, f"wrote {args.out}")
    stop()


def documents(held_out: bool) -> list[str]:
    """Pieces of the standard library's sources: of the files held out, or of all others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIP.isdisjoint(name.parts) and (zlib.crc32(name.as_posix().encode()) % 20 == 0) == held_out:
            found += pieces(path.read_text(encoding="utf-8", errors="replace"))
    return found


def pieces(source: str) -> list[str]:
    """A source file cut before its top-level definitions; a decorator stays with what it decorates."""
    cut: list[str] = []
    for part in re.split(r"\n(?=@|def |class |async def )", source):
        if cut and cut[-1].rsplit("\n", 1)[-1].startswith("@"):
            cut[-1] += "\n" + part
        else:
            cut.append(part)
    return [part.strip("\n") + "\n" for part in cut if part.strip()]


def shared_tokenizer(folder: Path, ranks: Ranks) -> Tokenizer:
    """The tokenizer in ``folder``, which rank 0 trains first."""
    path = folder / "tokenizer.json"
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=SHAPE.vocab, special_tokens=SPECIAL, initial_alphabet=alphabet)
        tokenizer.train_from_iterator(documents(held_out=False), trainer)
        tokenizer.save(str(path))
    dist.barrier()
    return Tokenizer.from_file(str(path))


def tokens(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All documents in one row, each between BOS and EOS."""
    return torch.tensor(
        [token for text in tokenizer.encode_batch(texts) for token in (SHAPE.bos, *text.ids, *SHAPE.eos)]
    )


def fit(model: Any, train: Tensor, held_out: Tensor, ranks: Ranks, args: argparse.Namespace) -> None:
    """Minimise next-token loss with AdamW; every rank draws the same batches."""
    optimizer = torch.optim.AdamW(groups(model), lr=args.peak_lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    draw = torch.Generator().manual_seed(1)
    started, recent = time.perf_counter(), 0.0
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(train) - SHAPE.context, (args.batch,), generator=draw)
        loss = next_token_loss(model, windows(train, starts, ranks))
        loss.backward()
        clip(model, ranks, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent += loss.item() / args.report_every
        if step % args.report_every == 0 or step == args.steps:
            minutes = (time.perf_counter() - started) / 60
            left = minutes * (args.steps / step - 1)
            losses = {"loss": recent, "held out": evaluate(model, held_out, ranks)}
            fc.log_metrics(step, losses)
            shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            say(ranks, f"step {step}/{args.steps}  {shown}  {minutes:.1f} min, {left:.1f} to go")
            recent = 0.0


def groups(model: Any) -> list[dict[str, Any]]:
    """Matrices decay, norms do not."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: linear up, then half a cosine down to 0."""
    warmup = min(warmup, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def windows(row: Tensor, starts: Tensor, ranks: Ranks) -> Tensor:
    """[batch, context + 1] tokens of ``row`` from every start."""
    return row[starts[:, None] + torch.arange(SHAPE.context + 1)].to(ranks.device)


def next_token_loss(model: Any, batch: Tensor) -> Tensor:
    """Mean cross entropy in nats of each token given those before it; batch: [b, context + 1]."""
    inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return model(inputs, positions, None, labels=labels).mean()


def clip(model: Any, ranks: Ranks, limit: float) -> None:
    """Scale all gradients so that their norm over all ranks is at most ``limit``; norms' weights are on every rank."""
    squares = torch.zeros((), device=ranks.device)
    for parameter in model.parameters():
        share = 1 if parameter.dim() > 1 else ranks.world
        squares += parameter.grad.square().sum() / share
    dist.all_reduce(squares)
    scale = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        parameter.grad *= scale


@torch.no_grad()
def evaluate(model: Any, held_out: Tensor, ranks: Ranks, batches: int = 4) -> float:
    """Loss on windows spread evenly over the held-out text."""
    starts = torch.linspace(0, len(held_out) - SHAPE.context - 2, batches * 16).long()
    losses = [next_token_loss(model, windows(held_out, part, ranks)).item() for part in starts.split(16)]
    return sum(losses) / len(losses)


def say(ranks: Ranks, text: str) -> None:
    """Print on rank 0."""
    if ranks.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
