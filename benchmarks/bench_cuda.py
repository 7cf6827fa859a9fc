"""The GPU codec against a device copy, and the fused collectives against their own 16-bit path, on one GPU.

run as:  python benchmarks/bench_cuda.py [SECTION ...]       (about a minute and a half; needs 8 GiB of GPU memory)

Ranks are virtual: blocks of one launch that exchange through inboxes in GPU memory, or in pinned host memory behind
the PCIe link. What one GPU cannot show is NVLink: over GPU memory, bytes saved cost nothing, so those times show the
cost of codec and protocol, not a speed-up. Times are medians over CUDA events; each result is checked against the
definition, or the exact sum, before it is timed. Rows are printed, and appended as lines of JSON to the file that
FLASHCOMM_CHECK_ROWS names (gpu_check.py), one by one, so that a run cut short leaves what it had. Ends with 1 if a
section failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from cuda_ranks import OneLaunch  # noqa: E402
from specification import Uncompressed, expected, outputs, same  # noqa: E402

from flashcomm_megatron.codec import Rotated, Spike, Uniform  # noqa: E402
from flashcomm_megatron.config import Config  # noqa: E402

KIB, MIB = 2**10, 2**20
BLOCK = 32
RECIPES = {name: Config(bits=4, recipe=name).legs for name in ("auto", "flash-v2")}
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=list(SECTIONS))
    failed = False
    for name in parser.parse_args().sections:
        print(f"\n{name}")
        for row in rows_of(SECTIONS[name]):
            failed |= "failed" in row
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            with open(os.environ.get("FLASHCOMM_CHECK_ROWS", os.devnull), "a") as rows:
                rows.write(json.dumps({"section": name, **row}) + "\n")
        torch.cuda.empty_cache()
    return int(failed)


def rows_of(section: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """What a section measures, why it ended if it failed, how long it took: it must not cost the others."""
    started = time.monotonic()
    try:
        yield from section()
    except Exception as error:
        yield {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    yield {"seconds": round(time.monotonic() - started, 1)}


def microseconds(run: Callable[[], Any], seconds: float = 0.4, least: int = 10) -> float:
    """Median time of one call, by events around each, warmed up."""
    run()
    torch.cuda.synchronize()
    started = time.monotonic()
    run()
    torch.cuda.synchronize()
    once = max(time.monotonic() - started, 1e-6)
    repeats = int(min(max(seconds / once, least), 300))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(1000 * a.elapsed_time(b) for a, b in pairwise(marks))


def graph_microseconds(run: Callable[[], Any], calls: int = 50) -> float:
    """Time of one of ``calls`` calls captured into a graph, so that no launch is waited for."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return microseconds(graph.replay, 0.2) / calls


def copy_rate(nbytes: int) -> float:
    """Bytes read and written per second by a device-to-device copy of ``nbytes``."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * nbytes / microseconds(lambda: target.copy_(source)) * 1e6


# ---- first of all: is it right ---------------------------------------------------------------------------------


def smoke() -> Iterator[Row]:
    """Every codec kernel on ordinary data, there and back, against the definition."""
    uniform = [Uniform(bits, 128) for bits in range(2, 9)] + [Uniform(4, 32), Uniform(4, 24)]
    rotated = [Rotated(4, 16), Rotated(4.5, 32), Rotated(5, 64), Rotated(8, 256)]
    for codec, dtype in product(uniform + rotated + [Spike(4, 64)], (torch.bfloat16, torch.float16, torch.float32)):
        if dtype == torch.float32 and codec.block == 256:
            continue
        x = torch.randn(40_001).to(dtype)
        payload = codec.encode(x.cuda())
        out = codec.decode_sum([payload], torch.empty_like(x, device="cuda"))
        wanted = codec.encode_ref(x)
        right = torch.equal(payload.cpu(), wanted), same(out, codec.decode_sum_ref([wanted], x.numel(), dtype))
        yield {"codec": str(codec), "dtype": str(dtype)[6:], "encode": right[0], "decode": right[1]}
        check(all(right), f"{codec} on {dtype}")


def fused_once() -> Iterator[Row]:
    """One launch of every kind with 2 and 8 virtual ranks, against the specification."""
    legs = {"flash-v1": (Uniform(4, 128), Uniform(4, 128)), **RECIPES}
    for world in (2, 8):
        with closing(OneLaunch(world)) as ranks:
            for kind, (name, codecs) in product(("one-step", "two-step", "reduce_scatter", "all_gather"), legs.items()):
                verify(ranks, kind, codecs)
                yield {"world": world, "kind": kind, "legs": name, "right": True}


# ---- codec ----------------------------------------------------------------------------------------------------


def codec() -> Iterator[Row]:
    """bf16 to payload and back; rate counts bytes read plus written, ratio is to a copy of the tensor."""
    for size in (256 * MIB, 1024 * MIB):
        copy = copy_rate(size)
        yield {"MiB": size // MIB, "copy GB/s": round(copy / 1e9)}
        x = torch.randn(size // 2, device="cuda").bfloat16()
        for bits in (4, 8):
            yield codec_row(Uniform(bits, BLOCK), x, copy)
    x = torch.randn(256 * MIB // 2, device="cuda").bfloat16()
    copy = copy_rate(256 * MIB)
    for block in (64, 128):
        yield codec_row(Uniform(4, block), x, copy)
    for codec in (Rotated(4, 32), Rotated(4.5, 32), Rotated(5, 64), Rotated(8, 32), Spike(4, 64), Spike(2, 64)):
        yield codec_row(codec, x, copy)
    for dtype in (torch.float16, torch.float32):
        yield codec_row(Uniform(4, BLOCK), x.to(dtype), copy_rate(x.numel() * dtype.itemsize))


def codec_row(codec: Any, x: Tensor, copy: float) -> Row:
    payload, out = codec.encode(x), torch.empty_like(x)
    sample = x[: 64 * BLOCK * 64].cpu()
    check(torch.equal(codec.encode(sample.cuda()).cpu(), codec.encode_ref(sample)), "encode")
    moved = x.numel() * x.element_size() + payload.numel()
    encode = moved / microseconds(lambda: codec.encode(x, payload)) * 1e6
    decode = moved / microseconds(lambda: codec.decode_sum([payload], out)) * 1e6
    return {
        "MiB": x.numel() * x.element_size() // MIB,
        "dtype": str(x.dtype).removeprefix("torch."),
        "codec": type(codec).__name__,
        "bits": codec.bits,
        "block": codec.block,
        "encode GB/s": round(encode / 1e9),
        "encode ratio": round(encode / copy, 3),
        "decode GB/s": round(decode / 1e9),
        "decode ratio": round(decode / copy, 3),
    }


def codec_compiled() -> Iterator[Row]:
    """The definition in torch, compiled by torch.compile into Triton kernels; beside it ours."""
    size = 256 * MIB
    x = torch.randn(size // 2, device="cuda").bfloat16()
    copy, codec = copy_rate(size), Uniform(4, BLOCK)
    encode = torch.compile(codec.encode_ref)
    payload = encode(x)
    moved = size + payload.numel()
    us = microseconds(lambda: encode(x))
    equal = torch.equal(payload, codec.encode(x))
    yield {"torch.compile encode ratio": round(moved / us * 1e6 / copy, 3), "equal to ours": equal}


# ---- collectives ----------------------------------------------------------------------------------------------


def all_reduce_host() -> Iterator[Row]:
    """2 virtual ranks, inboxes in pinned host memory, over the PCIe link. Bar: 4 bits 3.2x, 8 bits 1.8x."""
    with closing(OneLaunch(2, region=4 << 20, host_memory=True)) as ranks:
        for size in (16 * MIB, 64 * MIB, 128 * MIB):
            yield from against_uncompressed(ranks, "one-step", size)


def all_reduce_eight() -> Iterator[Row]:
    """8 virtual ranks in GPU memory, two-step; against the time its bytes take at a copy's rate. Bar: 60 %."""
    with closing(OneLaunch(8, region=4 << 20)) as ranks:
        size, copy = 64 * MIB, copy_rate(512 * MIB)
        uniform = {f"{bits} bits": (Uniform(bits, BLOCK), Uniform(bits, BLOCK)) for bits in (4, 8)}
        for name, legs in {**uniform, **RECIPES}.items():
            x = [torch.randn(size // 2, device="cuda").bfloat16() for _ in range(8)]
            out = outputs("two-step", x)
            verify(ranks, "two-step", legs)
            us = microseconds(lambda legs=legs, x=x, out=out: ranks.run("two-step", legs, x, out))
            payloads = sum(leg.wire_bytes(size // 2) for leg in legs)
            moved = 8 * (2 * size + 2 * payloads)  # per rank: x read, out written, each leg's payloads written and read
            floor = moved / copy * 1e6
            yield {
                "legs": name,
                "us": round(us, 1),
                "floor us": round(floor, 1),
                "share of floor": round(floor / us, 3),
            }


def latency() -> Iterator[Row]:
    """2 virtual ranks in GPU memory, one-step, in a graph: 4 and 8 bits against 16. Bar at 16 KiB: within 1.3x."""
    with closing(OneLaunch(2)) as ranks:
        for size in (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB, 4096 * KIB):
            x = [torch.randn(size // 2, device="cuda").bfloat16() for _ in range(2)]
            out, row = outputs("one-step", x), {"KiB": size // KIB}
            codecs = {"16 bits": Uncompressed(), "8 bits": Uniform(8, BLOCK), "4 bits": Uniform(4, BLOCK)}
            for name, codec in {**codecs, **{name: legs.reduce for name, legs in RECIPES.items()}}.items():
                us = graph_microseconds(lambda codec=codec, x=x, out=out: ranks.run("one-step", (codec, codec), x, out))
                row[f"{name} us"] = round(us, 2)
            row["4 bits over 16"] = round(row["4 bits us"] / row["16 bits us"], 3)
            yield row


def against_uncompressed(ranks: OneLaunch, kind: str, size: int) -> Iterator[Row]:
    """One size at 16 bits, then fewer, with the speed-up and what the bytes allow."""
    x = [torch.randn(size // 2, device="cuda").bfloat16() for _ in range(ranks.world)]
    out, exact_us = outputs(kind, x), 0.0
    compressed = Uniform(8, 128), Uniform(4, 128), Uniform(4, BLOCK), *(legs.reduce for legs in RECIPES.values())
    for codec in (Uncompressed(), *compressed):
        if codec.bits < 16:
            verify(ranks, kind, (codec, codec))
        us = microseconds(lambda codec=codec: ranks.run(kind, (codec, codec), x, out))
        exact_us = exact_us or us
        wire = size if codec.bits == 16 else codec.wire_bytes(size // 2)
        yield {
            "MiB": size // MIB,
            "codec": type(codec).__name__,
            "bits": codec.bits,
            "block": codec.block,
            "us": round(us, 1),
            "GB/s over the link, one way": round((ranks.world - 1) * ranks.world * wire / us / 1e3, 1),
            "speed-up": round(exact_us / us, 2),
            "bytes allow": round(size / wire, 2),
        }


def verify(ranks: OneLaunch, kind: str, codecs: Any) -> None:
    """A small call against the specification."""
    parts = [torch.randn(100_000 // ranks.world * ranks.world).bfloat16() for _ in range(ranks.world)]
    x = [part.cuda() for part in parts]
    out = outputs(kind, x)
    ranks.run(kind, codecs, x, out)
    want = expected(kind, codecs, parts)
    check(all(same(found, each) for found, each in zip(out, want, strict=True)), f"{kind} with {codecs}")
    check(ranks.kernels.error() == [], "a flag was missing")


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"{what}: wrong result, so not timed")


# ---- others ---------------------------------------------------------------------------------------------------


def deepspeed() -> Iterator[Row]:
    """DeepSpeed's 4-bit quantizer kernel on float16, where DeepSpeed is installed; blocks of 32, symmetric."""
    from deepspeed.ops.op_builder import QuantizerBuilder  # type: ignore[import-not-found]

    kernels = QuantizerBuilder().load()
    x = torch.randn(128 * MIB, device="cuda").half()
    groups = x.numel() // BLOCK
    us = microseconds(lambda: kernels.quantize(x, groups, 4, kernels.Symmetric))
    moved = x.numel() * 2 + x.numel() // 2 + 4 * groups
    yield {"encode ratio": round(moved / us * 1e6 / copy_rate(256 * MIB), 3)}


def symmetric_memory() -> Iterator[Row]:
    """torch's one-shot and two-shot all-reduce, 2 processes that take turns on this GPU: a cost, not a bandwidth."""
    import symmetric_memory_ranks

    yield from symmetric_memory_ranks.rows()


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "smoke": smoke,
    "fused_once": fused_once,
    "codec": codec,
    "all_reduce_host": all_reduce_host,
    "all_reduce_eight": all_reduce_eight,
    "latency": latency,
    "codec_compiled": codec_compiled,
    "symmetric_memory": symmetric_memory,
    "deepspeed": deepspeed,
}

if __name__ == "__main__":
    sys.exit(main())
