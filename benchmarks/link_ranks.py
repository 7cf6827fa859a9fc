"""What one rank of the link lab measures: collectives and a Megatron-Core GPT, stock and compressed, in turns.

Started by link_lab.py on a machine of its own. Rank 0 writes rows of JSON to ``--out``. Every quantized result is
compared with the exact one and between the ranks before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, partialmethod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

import flashcomm_megatron as fc
from flashcomm_megatron import collectives
from flashcomm_megatron.codec import Raw
from flashcomm_megatron.codec.recipes import Legs
from flashcomm_megatron.collectives import plan
from flashcomm_megatron.comm.communicator import Communicator

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from bench_collectives import implementations, relative_error, values
from hf_llama import Shape, build
from launch import start, stop

OVERLAPPED = 8 << 20  # bytes from which tensors are timed in one piece as well
COMPARED = 1 << 20  # and from which the same messages are timed with 16 bits a value: what compression alone gains
KINDS = ("all_reduce", "reduce_scatter", "all_gather")
BATCH, PROMPT = 4, 256
SHAPE = Shape(
    vocab=1024, hidden=512, ffn=1024, layers=4, heads=8, kv_heads=8, head_dim=64, context=512, eps=1e-5,
    rope_theta=1e4, rope_factor=None, tied=True, bos=1, eos=(2,),
)  # fmt: skip


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    ranks = start()
    rows = [collective(*case, options) for case in itertools.product(KINDS, options.sizes, options.widths)]
    rows += [traffic(nbytes) for nbytes in options.traffic]
    rows += [message(nbytes) for nbytes in options.sizes]
    if options.model:
        rows += model(options)
    if ranks.rank == 0:
        options.out.write_text(json.dumps(rows))
    dist.barrier()
    stop()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="bytes of the full tensor")
    parser.add_argument("--widths", type=int, nargs="*", default=[4])
    parser.add_argument(
        "--traffic", type=int, nargs="*", default=[], help="sizes whose bytes the interface is to count"
    )
    parser.add_argument("--model", action="store_true", help="time to first token, decoding and training as well")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring for each row")
    return parser.parse_args()


def collective(kind: str, nbytes: int, bits: int, options: argparse.Namespace) -> dict[str, Any]:
    """One collective of bfloat16, default flags, against torch.distributed's."""
    config = fc.Config(bits=bits)
    x = values(kind, nbytes // 2, torch.bfloat16)
    exact, quantized, restore = implementations(kind, x, config)
    fc.reset_stats()
    found = quantized()
    counted = fc.stats()
    error = relative_error(found, exact())
    assert error < 2.0 ** (2 - bits), f"{kind} {nbytes} {bits} bits: error {error}"
    if kind != "reduce_scatter":
        same_on_all_ranks(found)
    calls = {"exact": exact, "quantized": quantized}
    if nbytes >= OVERLAPPED:
        calls["whole"] = partial(in_one_piece, quantized, {}, {})
    if nbytes >= COMPARED:
        calls["uncoded"] = lambda: getattr(collectives, kind)(
            x.clone(), None, config, legs=Legs(Raw(x.dtype), Raw(x.dtype))
        )
    times = in_turns(calls, options.seconds, before=restore)
    assert found.isfinite().all(), f"{kind} {nbytes} {bits} bits: timed on sums that overflowed"
    row = {"what": kind, "bytes": nbytes, "bits": bits, **summary(times)}
    for name in set(calls) - {"exact", "quantized"}:
        row[f"{name}_ms"] = 1e3 * statistics.median(times[name])
    return row | {"compression": counted["exact_bytes"] / counted["wire_bytes"]}


def in_one_piece(call: Callable[[], Any], in_pieces: dict[Any, Any], whole: dict[Any, Any]) -> None:
    """``call`` without overlap of encoding, sending and decoding (plan.py); the plans of both ways are kept."""
    assert dist.group.WORLD is not None
    comm, values_of_a_piece = Communicator.of(dist.group.WORLD), dict(plan.PIECE)
    in_pieces.update(comm.plans)
    plan.PIECE.clear()
    comm.plans.clear()
    comm.plans.update(whole)
    try:
        call()
    finally:
        plan.PIECE.update(values_of_a_piece)
        whole.update(comm.plans)
        comm.plans.clear()
        comm.plans.update(in_pieces)


def traffic(nbytes: int, calls: int = 10) -> dict[str, Any]:
    """Bytes of 4-bit all-reduces that leave each machine, by its interface and by our own count."""
    x = values("all_reduce", nbytes // 2, torch.bfloat16)
    fc.all_reduce(x, None, fc.Config(bits=4))
    dist.barrier()
    fc.reset_stats()
    before = sent_by_interface()
    for _ in range(calls):
        fc.all_reduce(x, None, fc.Config(bits=4))
    dist.barrier()
    by_interface = sent_by_interface() - before if os.environ["LOCAL_RANK"] == "0" else 0  # once for each machine
    sums = torch.tensor([fc.stats()["remote_bytes"], by_interface])
    dist.all_reduce(sums)
    counted, interface = map(int, sums)
    return {"what": "traffic of all_reduce", "bytes": nbytes, "bits": 4, "counted_bytes": counted,
            "interface_bytes": interface, "interface_over_counted": interface / counted}  # fmt: skip


def message(nbytes: int, repeats: int = 7) -> dict[str, Any]:
    """What a message of ``nbytes`` takes from rank 0 to rank 1, after a pause in which the token bucket fills up.

    At the link's rate, or the lab measures another link. There and back, less what an empty answer takes.
    """
    there, back = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    times: dict[int, list[float]] = {1: [], nbytes: []}
    for x, _ in itertools.product((back, there), range(repeats)):
        dist.barrier()
        time.sleep(0.02)
        started = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(x, 1)
            dist.recv(back, 1)
        elif dist.get_rank() == 1:
            dist.recv(x, 0)
            dist.send(back, 0)
        times[x.numel()].append(time.perf_counter() - started)
    empty, full = (statistics.median(times[size]) for size in (1, nbytes))
    return {"what": "message", "bytes": nbytes, "message_ms": 1e3 * (full - empty)}


def sent_by_interface() -> int:
    """Bytes that this machine has sent so far, headers included."""
    interface = "eth0" if Path("/sys/class/net/eth0").exists() else "lo"
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def bytes_sent(call: Callable[[], Any]) -> int:
    """By this machine during ``call``: compressed sums, exact ones and headers."""
    dist.barrier()
    before = sent_by_interface()
    call()
    dist.barrier()
    return sent_by_interface() - before


PRODUCTS = ((torch, "matmul"), (torch.Tensor, "matmul"), (torch, "bmm"), (torch, "baddbmm"))


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Matrix products of bfloat16 in float32, which every CPU does fast; their results are bfloat16 again."""
    originals = [getattr(*place) for place in PRODUCTS]
    for (owner, name), original in zip(PRODUCTS, originals, strict=True):
        setattr(owner, name, partialmethod(_product, original) if owner is torch.Tensor else partial(_wide, original))
    try:
        yield
    finally:
        for (owner, name), original in zip(PRODUCTS, originals, strict=True):
            setattr(owner, name, original)


def _product(x: torch.Tensor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _wide(original, x, *args, **kwargs)


def _wide(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    found = original(*map(_widened, args), **{name: _widened(each) for name, each in kwargs.items()})
    return found.bfloat16() if any(getattr(each, "dtype", None) == torch.bfloat16 for each in args) else found


def _widened(x: Any) -> Any:
    return x.float() if getattr(x, "dtype", None) == torch.bfloat16 else x


def model(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill of a prompt, one decoding step, one training step."""
    gpt = build(SHAPE, dist.get_world_size(), torch.bfloat16, init_std=0.02)
    prompt = torch.randint(0, SHAPE.vocab, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    work = {
        "first token": lambda: forward(gpt, prompt),
        "decoding step": lambda: forward(gpt, prompt[:, :1]),
        "training step": lambda: train(gpt, prompt),
    }
    with products_in_float32():
        return [step(name, call, options) for name, call in work.items()]


def step(name: str, call: Callable[[], Any], options: argparse.Namespace) -> dict[str, Any]:
    """One row: stock Megatron, 4 bits by the default flags, and the same work without any communication."""

    settings = {"exact": nullcontext, "quantized": lambda: fc.flashcomm(bits=4), "compute": without_communication}
    sent = {}
    for each in ("exact", "quantized"):
        with settings[each]():
            call()
            sent[each] = bytes_sent(call)
    times = in_turns(dict.fromkeys(settings, call), 2 * options.seconds, settings)
    row = {"what": name, "compression": sent["exact"] / sent["quantized"], **summary(times)}
    return row | {"compute_ms": 1e3 * statistics.median(times["compute"])}


@torch.no_grad()
def forward(gpt: Any, tokens: torch.Tensor) -> None:
    """Logits of the last token, on every rank."""
    gpt.eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = gpt(tokens, positions, None)[:, -1].contiguous()
    dist.all_gather([torch.empty_like(logits) for _ in range(dist.get_world_size())], logits)


def train(gpt: Any, tokens: torch.Tensor) -> None:
    """Forward and backward."""
    gpt.train()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    gpt(tokens, positions, None, labels=tokens.roll(-1, 1)).mean().backward()
    gpt.zero_grad()


@contextmanager
def without_communication() -> Iterator[None]:
    """Sums that send nothing, so that what is left is the compute."""

    class Done:
        def wait(self) -> None:
            pass

    names = "all_reduce", "all_gather"
    originals = {name: getattr(dist, name) for name in names}
    for name in names:
        setattr(dist, name, lambda *args, **kwargs: Done())
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def in_turns(
    calls: dict[str, Callable[[], Any]],
    seconds: float,
    settings: Mapping[str, Callable[[], AbstractContextManager[Any]]] = MappingProxyType({}),
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of the slowest rank, of calls that take turns for about ``seconds``; at least three of each.

    In another order each turn, the same on all ranks: the first call behind an exact one is slower. ``settings`` are
    entered and left outside what is timed, and each call made once before, as scripts do; so is ``before``, ahead of
    every call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, began = random.Random(0), time.perf_counter()
    while True:
        for name, call in order.sample(list(calls.items()), len(calls)):
            with settings.get(name, nullcontext)():
                if name in settings:
                    call()
                before()
                dist.barrier()
                started = time.perf_counter()
                call()
                taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            times[name].append(taken.item())
        enough = torch.tensor(float(time.perf_counter() - began > seconds))
        dist.all_reduce(enough, dist.ReduceOp.MAX)
        if (len(times["exact"]) >= 3 and enough) or len(times["exact"]) >= 200:
            return times


def summary(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians, their ratio, and the band in which the exact times lie."""
    exact, quantized = (statistics.median(times[name]) for name in ("exact", "quantized"))
    ordered = sorted(times["exact"])
    return {
        "exact_ms": 1e3 * exact,
        "quantized_ms": 1e3 * quantized,
        "speedup": exact / quantized,
        "noise": ordered[len(ordered) * 3 // 4] / ordered[len(ordered) // 4] - 1,  # width of the middle half
        "repeats": len(ordered),
    }


def same_on_all_ranks(x: torch.Tensor) -> None:
    """AssertionError unless every rank holds the same bits."""
    bits = x.view(torch.int16).long().sum().reshape(1)
    everyone = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, bits)
    assert all(torch.equal(each, bits) for each in everyone), "the ranks hold different results"


if __name__ == "__main__":
    main()
