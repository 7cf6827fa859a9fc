"""The demo: one small model on two ranks, joined by a slow link, at 16 bits and fewer.

    make demo                     two ranks on this machine; as root they are joined by a link of 10 Mbit/s
    make demo GPU=1               two GPUs over NCCL
    MODEL=DIR make demo           your own Hugging Face LLaMA checkpoint

For each width it prints the text that the model writes, the time to the first token of a long prompt, tokens per second
of a batch, the perplexity of a text, and the bytes that one rank sent for that text.

The slow link is a pair of network namespaces with a token bucket (benchmarks/link_hosts.py), which needs root. Without
root the ranks talk over loopback, which is fast, so that times hardly change; the demo then says so. The rate makes the
sums of this small model take most of the time to its first token, as they do for a 70B model on eight PCIe GPUs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "benchmarks"), str(HERE)]
OWN_MODEL = HERE / "models" / "python-stdlib-3M"
EXACT, WIDTHS = 16, (16, 8, 4)
SEQUENCES, STEPS = 32, 16  # of the batch whose tokens per second are measured
PORT = "29517"


class Result(NamedTuple):
    """What one width gave on rank 0."""

    text: str
    first_token: float  # seconds, the best of three
    tokens_per_second: float
    perplexity: float
    sent: int  # bytes of this rank's tensor-parallel sums while the text was scored
    exact: int  # bytes of the same sums at 16 bits


def main() -> int:
    options = arguments().parse_args()
    if "RANK" in os.environ:
        run_rank(options)
        return 0
    return gpus(options) if options.gpu else cpus(options)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=OWN_MODEL, help="Hugging Face directory of a LLaMA model.")
    parser.add_argument("--text", type=Path, default=OWN_MODEL / "held-out.txt", help="Text to score.")
    parser.add_argument("--documents", type=int, default=12, help="Score at most so many documents of it.")
    parser.add_argument("--rate", default="10mbit", help="Rate of the slow link, as tc writes it.")
    parser.add_argument("--local", action="store_true", help="Make no slow link: loopback, also as root.")
    parser.add_argument("--gpu", action="store_true", help="Two GPUs over NCCL.")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="Also write demo.json and demo.csv there.")
    parser.add_argument("--link", default="", help=argparse.SUPPRESS)  # said to the ranks: how they are joined
    return parser


# ---- starting two ranks -----------------------------------------------------------------------------------------


def cpus(options: argparse.Namespace) -> int:
    """Two ranks on CPUs: over a slow link if one can be made here, else over loopback."""
    from link_hosts import Hosts, Refused

    try:
        if options.local:
            raise Refused("--local was given.")
        with Hosts(2, options.rate) as hosts:
            rate = options.rate.replace("mbit", " Mbit/s").replace("gbit", " Gbit/s")
            there = {"MASTER_ADDR": hosts.address(0), "GLOO_SOCKET_IFNAME": "eth0"}
            return wait([
                hosts.start(rank, again(f"a link of {rate}, made of network namespaces"), there | ranked(rank))
                for rank in range(2)
            ])  # fmt: skip
    except Refused as reason:
        print(f"No slow link: {reason}\nThe ranks talk over loopback, so times hardly change; bytes do.", flush=True)
    here = {"MASTER_ADDR": "127.0.0.1"}
    environments = [os.environ | here | ranked(rank) for rank in range(2)]
    return wait([subprocess.Popen(again("loopback"), env=environment) for environment in environments])


def gpus(options: argparse.Namespace) -> int:
    """Two ranks on two GPUs over NCCL, or a sentence about what is missing."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        built = f"torch {torch.__version__} sees {count}" if torch.version.cuda else "this torch is built without CUDA"
        print(f"make demo GPU=1 needs two GPUs; {built}. `make demo` runs without any.", file=sys.stderr)
        return 2
    here = {"MASTER_ADDR": "127.0.0.1"}
    environments = [os.environ | here | ranked(rank) | {"LOCAL_RANK": str(rank)} for rank in range(2)]
    return wait([subprocess.Popen(again("NCCL"), env=environment) for environment in environments])


def ranked(rank: int) -> dict[str, str]:
    """What torchrun would tell a rank; each CPU rank is the only one of its machine."""
    quiet = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return quiet | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": PORT}


def again(link: str) -> list[str]:
    """This very command, for a rank."""
    return [sys.executable, str(HERE / "demo.py"), *sys.argv[1:], "--link", link]


def wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """The first failure's exit code, after ending the other rank, or 0."""
    try:
        while any(process.poll() is None for process in processes):
            if failed := [process.returncode for process in processes if process.returncode]:
                return failed[0]
            time.sleep(0.1)
        return next((process.returncode for process in processes if process.returncode), 0)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait(30)


# ---- one rank ---------------------------------------------------------------------------------------------------


def run_rank(options: argparse.Namespace) -> None:
    """Build the model, run every width, print on rank 0."""
    from hf_checkpoint import Checkpoint, ModelError, read_shape
    from hf_llama import build, load
    from launch import refuse, start, stop

    import flashcomm_megatron as fc

    try:
        shape = read_shape(options.model, 2)
        weights = Checkpoint(options.model, shape)
    except (ModelError, OSError) as error:
        refuse(str(error))
    ranks = start()
    model = build(shape, 2, torch.bfloat16).to(ranks.device).eval()
    load(model, weights, shape, ranks.rank, ranks.world)
    results = {}
    for bits in WIDTHS:
        if ranks.rank == 0:
            print(f"   running at {bits} bits ...", flush=True)
        # The model's sums are small, so no minimum size.
        with fc.flashcomm(bits=bits, min_bytes=0) if bits != EXACT else nullcontext():
            results[bits] = measure(model, shape, options, ranks, bits != EXACT)
    if ranks.rank == 0:
        print(page(results, options))
        if options.out:
            write(results, options)
    stop()


@torch.inference_mode()
def measure(model: Any, shape: Any, options: argparse.Namespace, ranks: Any, compressed: bool) -> Result:
    """Everything that one width is asked."""
    from generate import read_tokenizer

    import flashcomm_megatron as fc

    tokenizer = read_tokenizer(options.model / "tokenizer.json", shape)
    documents = [
        [shape.bos, *tokenizer.encode(text.strip(), add_special_tokens=False).ids][: shape.context]
        for text in options.text.read_text().split("<|endoftext|>")
    ]
    everything = [token for tokens in documents for token in tokens]
    documents = documents[: options.documents]
    prompt = everything[: min(shape.context - 1, 1024)]
    perplexity(model, documents[:2], ranks)  # warm: ranks compare configurations, buffers exist
    first = min(timed(continued, model, [prompt], 1, ranks) for _ in range(3))
    rows = [everything[at : at + 8] for at in range(SEQUENCES)]
    seconds = timed(continued, model, rows, STEPS, ranks)
    start = tokenizer.encode("def find_file(", add_special_tokens=False).ids
    text = tokenizer.decode(continued(model, [[shape.bos, *start]], 40, ranks)[0])
    fc.reset_stats()
    score = perplexity(model, documents, ranks)
    tokens = sum(len(each) - 1 for each in documents)
    exact = 2 * shape.layers * tokens * shape.hidden * 2  # two sums a layer, two bytes a value, one message at TP2
    sent = fc.stats()["wire_bytes"] if compressed else exact
    return Result(text.split("\n\n\n")[0], first, SEQUENCES * STEPS / seconds, score, sent, exact)


def continued(model: Any, prompts: list[list[int]], count: int, ranks: Any) -> list[list[int]]:
    """The prompts, all of one length, each with ``count`` most likely tokens, by a cache of keys and values."""
    from megatron.core.inference.contexts import StaticInferenceContext

    length = len(prompts[0])
    context = StaticInferenceContext(len(prompts), length + count)
    tokens = torch.tensor(prompts, device=ranks.device)
    feed, offset = tokens, 0
    for _ in range(count):
        positions = torch.arange(offset, offset + feed.shape[1], device=ranks.device).expand_as(feed)
        logits = model(feed, positions, None, inference_context=context, runtime_gather_output=True)
        offset += feed.shape[1]
        context.increment_sequence_len_offset(feed.shape[1])
        context.enable_decode_mode()
        feed = logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, feed], 1)
    return tokens.tolist()  # type: ignore[no-any-return]


def perplexity(model: Any, documents: list[list[int]], ranks: Any) -> float:
    """Perplexity a token, of every token of a document given those before it."""
    losses = []
    for document in documents:
        ids = torch.tensor([document], device=ranks.device)
        positions = torch.arange(ids.shape[1] - 1, device=ranks.device)[None]
        losses.append(model(ids[:, :-1], positions, None, labels=ids[:, 1:])[0])
    return torch.cat(losses).float().mean().exp().item()


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


# ---- what the user sees -----------------------------------------------------------------------------------------


def page(results: dict[int, Result], options: argparse.Namespace) -> str:
    """Texts, the table, and what to type next."""
    exact = results[EXACT]
    lines = [f"\n{options.model.name} on two tensor-parallel ranks over {options.link}"]
    for bits, result in results.items():
        lines.append(f"\n--- {bits} bits{' (Megatron unchanged)' if bits == EXACT else ''}\n{result.text}")
    lines.append(f"\n{table(results)}")
    best = results[WIDTHS[-1]]
    lines.append(
        f"\nAt {WIDTHS[-1]} bits a rank sends {exact.sent / best.sent:.1f}x fewer bytes; the first token comes "
        f"{exact.first_token / best.first_token:.1f}x sooner and perplexity changes by "
        f"{best.perplexity / exact.perplexity - 1:+.2%}."
    )
    if "loopback" in options.link:
        lines.append("Over loopback there is no slow link to relieve; as root the demo makes one.")
    lines.append(
        "\nNext, in your own job:  torchrun --nproc-per-node 8 -m flashcomm_megatron pretrain_gpt.py ... "
        "--flash-comm-bits 8\nOr your own checkpoint: MODEL=DIR make demo"
    )
    return "\n".join(lines)


def table(results: dict[int, Result]) -> str:
    """One line for each width, columns aligned."""
    rows = [["bits", "first token", "", "tokens/s", "", "perplexity", "", "sent per rank", ""]]
    rows += [row(bits, result, results[EXACT]) for bits, result in results.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in rows)


def row(bits: int, result: Result, exact: Result) -> list[str]:
    """One line of the table; gains and losses are against 16 bits."""
    cells = [
        str(bits),
        *(f"{result.first_token * 1000:.0f} ms", f"{exact.first_token / result.first_token:.1f}x"),
        *(f"{result.tokens_per_second:.0f}", f"{result.tokens_per_second / exact.tokens_per_second:.1f}x"),
        *(f"{result.perplexity:.3f}", f"{result.perplexity / exact.perplexity - 1:+.2%}"),
        *(f"{result.sent / 2**20:.1f} MiB", f"{exact.sent / result.sent:.1f}x fewer"),
    ]
    return cells if bits != EXACT else [cell if at % 2 == 1 or at == 0 else "" for at, cell in enumerate(cells)]


def write(results: dict[int, Result], options: argparse.Namespace) -> None:
    """The numbers with machine, versions and commit, for README."""
    from record import save

    rows = [{"bits": bits, "link": options.link, **result._asdict()} for bits, result in results.items()]
    print(f"wrote {save('demo', rows, options.out)}")


if __name__ == "__main__":
    sys.exit(main())
