"""The compiled codec on one core, in bytes of the tensor per second, against memcpy of the same tensor in the same run.

run as:  python benchmarks/bench_codec.py            (widths 2 to 8, three dtypes, a tensor in cache and one in memory)
         python benchmarks/bench_codec.py --quick    (bfloat16, widths 4 and 8; writes nothing)

Every result is compared with the torch definition, bit for bit, before it is timed. Times are medians over repetitions
in which memcpy and the codec take turns; the definition itself is timed on at most 4 MiB. ``sum2`` decodes two
payloads and writes their sum, the inner loop of an all-reduce over two ranks. Writes CSV, JSON and a plot.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor

from flashcomm_megatron.codec import Uniform
from flashcomm_megatron.codec import native as compiled

KIB, MIB = 2**10, 2**20
SIZES = [256 * KIB, 64 * MIB]  # bytes of the tensor: one that stays in the second-level cache, one that fits no cache
DTYPES = ["bfloat16", "float16", "float32"]
REFERENCE_BYTES = 4 * MIB
SECONDS = 0.002  # least duration of one timing: smaller calls are repeated inside it


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if not compiled.available():
        raise SystemExit(f"bench_codec: no compiled codec ({compiled.reason()}).")
    print(
        f"{record.circumstances()['cpu']}, one core, {compiled.describe()}, block {options.block}, GB/s of the tensor"
    )
    print("| dtype | KiB | bits | memcpy | encode | decode | sum2 | encode ratio | decode ratio | torch enc. | dec. |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    rows = []
    for dtype in options.dtypes:
        for size in options.sizes:
            for bits in options.widths:
                rows.append(measure(getattr(torch, dtype), size, Uniform(bits, options.block), options.repeats))
                show(rows[-1])
    if not options.quick:
        record.save("codec", rows)
        plot(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of the tensor")
    parser.add_argument("--widths", type=int, nargs="+", default=list(range(2, 9)))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="bfloat16, 4 and 8 bits; writes nothing")
    options = parser.parse_args()
    if options.quick:
        options.dtypes, options.widths = ["bfloat16"], [4, 8]
    return options


def measure(dtype: torch.dtype, size: int, codec: Uniform, repeats: int) -> dict[str, Any]:
    """One row."""
    x = torch.randn(size // dtype.itemsize, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, payload = torch.empty_like(x), torch.empty(codec.wire_bytes(x.numel()), dtype=torch.uint8)
    check(codec, x[: REFERENCE_BYTES // dtype.itemsize])
    calls = {
        "memcpy": lambda: ctypes.memmove(out.data_ptr(), x.data_ptr(), size),
        "encode": lambda: codec.encode(x, payload),
        "decode": lambda: codec.decode_sum([payload], out),
        "sum2": lambda: codec.decode_sum([payload, payload], out),
    }
    rates = {name: size / seconds / 1e9 for name, seconds in alternate(calls, repeats).items()}
    part = x[: REFERENCE_BYTES // dtype.itemsize]
    parcel = codec.encode_ref(part)
    reference = alternate(
        {
            "torch_encode": lambda: codec.encode_ref(part),
            "torch_decode": lambda: codec.decode_sum_ref([parcel], part.numel(), dtype),
        },
        3,
    )
    rates |= {name: part.nbytes / seconds / 1e9 for name, seconds in reference.items()}
    return {
        "isa": compiled.info()["isa"],
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": size,
        "bits": codec.bits,
        "block": codec.block,
        **{f"{name}_gbs": round(rate, 3) for name, rate in rates.items()},
        "encode_ratio": round(rates["encode"] / rates["memcpy"], 3),
        "decode_ratio": round(rates["decode"] / rates["memcpy"], 3),
    }


def check(codec: Uniform, x: Tensor) -> None:
    """The compiled codec must give the definition's bits."""
    payload, out = codec.encode(x), torch.empty_like(x)
    assert torch.equal(payload, codec.encode_ref(x)), f"{codec}: encode differs from its definition"
    for payloads in ([payload], [payload, payload]):
        expected = codec.decode_sum_ref(payloads, x.numel(), x.dtype)
        assert torch.equal(codec.decode_sum(payloads, out), expected), f"{codec}: decode differs from its definition"


def alternate(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of one call of each, taking turns after a warm-up."""
    inner = {name: max(1, int(SECONDS / timed(call, 2))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(timed(call, inner[name]))
    return {name: statistics.median(each) for name, each in times.items()}


def timed(call: Callable[[], object], count: int) -> float:
    """Seconds of one of ``count`` calls, of this thread's time: other programs may run."""
    started = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - started) / count


def show(row: dict[str, Any]) -> None:
    print(
        f"| {row['dtype']} | {row['bytes'] // KIB} | {row['bits']} | {row['memcpy_gbs']:.1f} | {row['encode_gbs']:.1f} "
        f"| {row['decode_gbs']:.1f} | {row['sum2_gbs']:.1f} | {row['encode_ratio']:.2f} | {row['decode_ratio']:.2f} "
        f"| {row['torch_encode_gbs']:.2f} | {row['torch_decode_gbs']:.2f} |",
        flush=True,
    )


def plot(rows: list[dict[str, Any]]) -> None:
    """Rate over memcpy's against width, a panel for encode and decode at each size, a line for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row["bytes"] for row in rows})
    figure, axes = plt.subplots(len(sizes), 2, figsize=(9, 3.2 * len(sizes)), sharex=True, squeeze=False)
    for line, size in enumerate(sizes):
        for axis, way in zip(axes[line], ("encode", "decode"), strict=True):
            for dtype in DTYPES:
                chosen = [row for row in rows if (row["dtype"], row["bytes"]) == (dtype, size)]
                axis.plot([r["bits"] for r in chosen], [r[f"{way}_ratio"] for r in chosen], marker="o", label=dtype)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(title=f"{way}, {size // KIB} KiB", xlabel="bits", ylabel="rate / memcpy", ylim=(0, None))
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(record.RESULTS / "codec.png", dpi=120)


if __name__ == "__main__":
    main()
