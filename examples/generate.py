"""Generate text and score a file with a LLaMA checkpoint on Megatron-Core, exactly and with compressed sums.

    torchrun --nproc-per-node 2 examples/generate.py --model DIR --prompt "..." --perplexity FILE --flash-comm-bits 4

The checkpoint is a Hugging Face directory; tensor parallelism is as wide as there are ranks. The same work is done at
16 bits, Megatron's own exact sums, and then at the flag's width: what is compressed, what that saves and what it costs.
``--compare 16,8,4`` chooses the widths. Runs on GPUs over NCCL, without any over gloo, or as one process.

You should see, for each width, the same beginning of the text, a perplexity within a percent or two of the exact one,
and the bytes that a rank sent: about half of them at 8 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hf_checkpoint import Checkpoint, ModelError, Shape, read_shape
from hf_llama import build, load
from launch import Ranks, refuse, start, stop, world_size
from tokenizers import Tokenizer
from torch import Tensor

import flashcomm_megatron as fc

OWN_MODEL = Path(__file__).parent / "models" / "python-stdlib-3M"
EXACT = 16
SEPARATOR = "<|endoftext|>"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Job(NamedTuple):
    """What every rank has read and checked before it starts to wait for the others."""

    shape: Shape
    weights: Checkpoint
    tokenizer: Tokenizer
    prompt: list[int]
    documents: list[list[int]]
    widths: dict[int, fc.Config | None]  # bits -> how to compress; None: exact


class Run(NamedTuple):
    """What one width gave."""

    text: str
    perplexity: float | None
    first_token: float  # seconds from the prompt to the first token
    sums: float  # seconds in tensor-parallel sums while scoring, or reading the prompt if there is no text to score
    stats: dict[str, Any]  # flashcomm's counters of the same work; empty when exact
    generating: dict[str, Any]  # the counters while generating


def main() -> None:
    args = parse(sys.argv[1:])
    fc.disable()  # the flag switches compression on at once; here widths are switched on one by one
    try:
        job = prepare(args)
    except (ModelError, ValueError, OSError) as error:
        refuse(str(error))
    ranks = start()
    model = build(job.shape, ranks.world, dtype(args)).to(ranks.device).eval()
    load(model, job.weights, job.shape, ranks.rank, ranks.world)
    runs = {bits: run(model, job, config, args.tokens, ranks) for bits, config in job.widths.items()}
    if ranks.rank == 0:
        report(job, runs, args, ranks)
    stop()


# ---- before the ranks start -------------------------------------------------------------------------------------


def parse(words: list[str]) -> argparse.Namespace:
    """The command line. ``--compare`` names widths too, so that --flash-comm-bits need not be given beside it."""
    compare = argparse.ArgumentParser(add_help=False)
    compare.add_argument("--compare", default="")
    compressed = [word for word in compare.parse_known_args(words)[0].compare.split(",") if word != str(EXACT)]
    if compressed[:1] != [""] and compressed and not any(word.startswith("--flash-comm-bits") for word in words):
        words = [*words, "--flash-comm-bits", compressed[0]] if compressed[0].isdigit() else words
    args = arguments().parse_args(words)
    if args.prompt is None:
        args.prompt = "def find_file(" if args.model == OWN_MODEL else "Once upon a time"
    return args


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=OWN_MODEL, help="Hugging Face directory of a LLaMA model.")
    parser.add_argument("--prompt", help="Text to continue. Default: the start of a function, or of a story.")
    parser.add_argument(
        "--template",
        default="{}",
        help="What is put around the prompt, which takes the place of {}; \\n is a new line.",
    )
    parser.add_argument("--tokens", type=int, default=40, help="Tokens to generate at most, greedily.")
    parser.add_argument(
        "--perplexity", type=Path, metavar="FILE", help=f"Text to score, documents parted by {SEPARATOR}."
    )
    parser.add_argument("--max-documents", type=int, metavar="N", help="Score only the first N documents or windows.")
    parser.add_argument("--window", type=int, default=1024, help="Tokens scored together at most, default 1024.")
    parser.add_argument(
        "--compare", metavar="16,8,4", help="Widths to run, 16 being exact (default: 16 and the flag's)."
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="Default: bfloat16.")
    return fc.add_arguments(parser)


def dtype(args: argparse.Namespace) -> torch.dtype:
    return DTYPES[args.dtype]


def prepare(args: argparse.Namespace) -> Job:
    """Read and check everything; ModelError, ValueError or OSError says what is wrong in one sentence."""
    widths = configurations(args)
    shape = read_shape(args.model, world_size())
    tokenizer = read_tokenizer(args.model / "tokenizer.json", shape)
    prompt = encode(tokenizer, shape, args.template.replace("\\n", "\n").replace("{}", args.prompt))
    if not prompt:
        raise ModelError("--prompt is empty and the model has no token that begins a text: give a prompt.")
    if args.tokens < 1 or len(prompt) + args.tokens > shape.context:
        raise ModelError(
            f"A prompt of {len(prompt)} tokens and --tokens {args.tokens} do not fit into the model's context of "
            f"{shape.context}: shorten one of them."
        )
    documents = read_documents(args, tokenizer, shape) if args.perplexity else []
    return Job(shape, Checkpoint(args.model, shape), tokenizer, prompt, documents, widths)


def configurations(args: argparse.Namespace) -> dict[int, fc.Config | None]:
    """Width -> configuration, from --compare or the flag; every other --flash-comm option holds for all widths."""
    given = {field.name: getattr(args, f"flash_comm_{field.name}") for field in dataclasses.fields(fc.Config)}
    options = {name: value for name, value in given.items() if value is not None}
    flag = options.pop("bits", None)
    try:
        bits = [int(word) for word in args.compare.split(",")] if args.compare else [EXACT, flag or EXACT]
    except ValueError:
        raise ModelError(f"--compare {args.compare}: give widths like 16,8,4.") from None
    return {width: None if width == EXACT else fc.Config(width, **options) for width in bits}


def read_tokenizer(path: Path, shape: Shape) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"{path} cannot be read: {error}.") from None
    if tokenizer.get_vocab_size() > shape.vocab:
        raise ModelError(f"{path} knows {tokenizer.get_vocab_size()} tokens, config.json says {shape.vocab}.")
    return tokenizer


def encode(tokenizer: Tokenizer, shape: Shape, text: str) -> list[int]:
    """The tokens of a text, after the one that begins a text if the model has it and the text does not."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return ids if shape.bos is None or ids[:1] == [shape.bos] else [shape.bos, *ids]


def read_documents(args: argparse.Namespace, tokenizer: Tokenizer, shape: Shape) -> list[list[int]]:
    """What is scored: the beginning of each document of the file, or, of one long text, windows one after the other.

    None is longer than --window: attention takes memory by the square of the tokens that are read together, and some
    models declare contexts of 131072.
    """
    if not args.perplexity.is_file():
        raise ModelError(f"There is no text file {args.perplexity}.")
    texts = args.perplexity.read_text(encoding="utf-8", errors="replace").split(SEPARATOR)
    length = min(args.window, shape.context)
    encoded = [encode(tokenizer, shape, text.strip()) for text in texts]
    if len(encoded) == 1:
        encoded = [encoded[0][first : first + length] for first in range(0, len(encoded[0]), length)]
    documents = [tokens[:length] for tokens in encoded if len(tokens) > 1][: args.max_documents]
    if not documents:
        raise ModelError(f"{args.perplexity} holds no text to score.")
    return documents


# ---- one width --------------------------------------------------------------------------------------------------


def run(model: Any, job: Job, config: fc.Config | None, count: int, ranks: Ranks) -> Run:
    """Generate, score and time with one configuration."""
    with fc.flashcomm(config) if config else nullcontext():
        work(model, job._replace(documents=job.documents[:1]), ranks)  # warm: ranks agree, buffers exist
        fc.reset_stats()
        text = generate(model, job, count, ranks)
        generating = fc.stats()
        first = statistics.median(timed(generate, model, job, 1, ranks) for _ in range(3))
        fc.reset_stats()
        with exact_sums() as exact:
            perplexity = work(model, job, ranks)
        counted = fc.stats() if config else {}
    return Run(text, perplexity, first, exact[0] + counted.get("seconds", 0.0), counted, generating if config else {})


def work(model: Any, job: Job, ranks: Ranks) -> float | None:
    """What is measured: score the documents and return their perplexity, or else read the prompt."""
    if job.documents:
        return score(model, job, ranks)
    generate(model, job, 1, ranks)
    return None


@torch.inference_mode()
def generate(model: Any, job: Job, count: int, ranks: Ranks) -> str:
    """The most likely continuation of the prompt, ``count`` tokens or up to the end of text, with a KV cache."""
    from megatron.core.inference.contexts import StaticInferenceContext

    context = StaticInferenceContext(1, len(job.prompt) + count)
    tokens = list(job.prompt)
    feed = tokens
    while len(tokens) < len(job.prompt) + count:
        logits = forward(model, feed, context.sequence_len_offset, ranks, context)
        context.increment_sequence_len_offset(len(feed))
        context.enable_decode_mode()
        feed = [int(logits[-1, : job.shape.vocab].argmax())]
        if feed[0] in job.shape.eos:
            break
        tokens += feed
    before = job.tokenizer.decode(job.prompt)
    return job.tokenizer.decode(tokens)[len(before) :]


@torch.inference_mode()
def score(model: Any, job: Job, ranks: Ranks) -> float:
    """Perplexity per token: of every token of a document but its first, given those before it."""
    nats, predicted = 0.0, 0
    for document in job.documents:
        logits = forward(model, document[:-1], 0, ranks)[:, : job.shape.vocab].float()
        nats += F.cross_entropy(logits, torch.tensor(document[1:], device=ranks.device), reduction="sum").item()
        predicted += len(document) - 1
    return float(torch.tensor(nats / predicted).exp())


def forward(model: Any, tokens: list[int], offset: int, ranks: Ranks, context: Any = None) -> Tensor:
    """Logits [tokens, vocabulary] of ``tokens`` at positions from ``offset``; with a context, of the last one alone."""
    ids = torch.tensor([tokens], device=ranks.device)
    positions = torch.arange(offset, offset + len(tokens), device=ranks.device)[None]
    return model(ids, positions, None, inference_context=context, runtime_gather_output=True)[0]


def timed(function: Any, *args: Any) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


@contextmanager
def exact_sums() -> Iterator[list[float]]:
    """Yields [seconds spent in torch.distributed.all_reduce], which Megatron looks up at every exact sum."""
    seconds, original = [0.0], dist.all_reduce

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[0] += time.perf_counter() - started

    dist.all_reduce = all_reduce
    try:
        yield seconds
    finally:
        dist.all_reduce = original


# ---- what the user sees -----------------------------------------------------------------------------------------


def report(job: Job, runs: dict[int, Run], args: argparse.Namespace, ranks: Ranks) -> None:
    """Print texts, table and how to read it."""
    shape, kind = job.shape, dtype(args)
    model = f"{shape.layers} layers, hidden size {shape.hidden}, {str(kind).removeprefix('torch.')}"
    parallel = f"{ranks.world} tensor-parallel rank{'s' if ranks.world > 1 else ''} over {dist.get_backend()}"
    print(f"\n{os.path.relpath(args.model)}: {model}, {parallel}")
    for bits, result in runs.items():
        print(f"\n--- {title(bits, kind)}{share(result.generating)}\n{args.prompt}{result.text}")
    rows = [["bits", "perplexity", "change", "sent per rank", "compression", "in sums", "first token"]]
    rows += [row(bits, runs, kind) for bits in runs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(
        "\n"
        + "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in rows)
    )
    measured = f"reading the prompt of {len(job.prompt)} tokens"
    if job.documents:
        measured = f"scoring {len(job.documents)} documents of {sum(map(len, job.documents)):,} tokens"
    print(f"\nSent and seconds in tensor-parallel sums: {measured}; seconds include waiting for the other ranks.")
    print(f"Compression: bytes of exact sums, {kind.itemsize * 8} bits a value here, over bytes sent.")


def title(bits: int, kind: torch.dtype) -> str:
    return f"{kind.itemsize * 8} bits (exact)" if bits == EXACT else f"{bits} bits"


def share(stats: dict[str, Any]) -> str:
    """How many of the sums were compressed, and why others were not."""
    if not stats:
        return ""
    left = "".join(f", {count} exact: {reason}" for reason, count in stats["deferred"].items())
    return f" ({stats['quantized']} of {stats['calls']} sums compressed{left})"


def row(bits: int, runs: dict[int, Run], kind: torch.dtype) -> list[str]:
    """One line of the table; the bytes of the exact run are those any other run counted for the same work."""
    result, exact = runs[bits], runs.get(EXACT)
    stats = result.stats or next((other.stats for other in runs.values() if other.stats), {})
    sent = stats.get("wire_bytes" if result.stats else "exact_bytes")
    change = ""
    if exact and exact is not result and result.perplexity and exact.perplexity:
        change = f"{result.perplexity / exact.perplexity - 1:+.2%}"
    return [
        title(bits, kind).replace(" bits", ""),
        f"{result.perplexity:.3f}" if result.perplexity else "-",
        change,
        f"{sent / 2**20:.2f} MiB" if sent is not None else "-",
        f"{stats['exact_bytes'] / sent:.2f}x" if sent else "-",
        f"{result.sums:.2f} s",
        f"{result.first_token * 1000:.1f} ms",
    ]


if __name__ == "__main__":
    main()
