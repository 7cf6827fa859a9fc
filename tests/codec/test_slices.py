"""Batched calls give the bits of single calls, in one native call each, and check what they are given."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codec_cases import DTYPES, same, tensor
from torch import Tensor

import flashcomm_megatron
from flashcomm_megatron.codec import Codec, Microscaling, Rotated, Slices, Spike, Uniform
from flashcomm_megatron.codec import native as compiled

CODECS = [
    Rotated(4.5, 32), Rotated(5, 64), Rotated(8, 16), Rotated(2, 128), Uniform(4, 64), Uniform(5, 24), Uniform(8, 128),
    Spike(2, 64), Spike(5, 32), Microscaling("e2m1", 32),
]  # fmt: skip
PACKAGE = str(Path(flashcomm_megatron.__file__).parent)
needs_extension = pytest.mark.skipif(not compiled.available(), reason=f"no compiled codec: {compiled.reason()}")


def cuts(codec: Codec) -> list[Slices]:
    """Slices of rows and of tensors of one row; short ones, empty ones, more ranks than rows."""
    found = [Slices(0, 576, 0, 2), Slices(3 * 80, 80, 80, 8), Slices(37 * 100, 100, 500, 8), Slices(999, 999, 999, 1)]
    for world in (2, 3, 8):
        found.append(Slices(5 * 576, 576, math.ceil(5 / world) * 576, world))
        found.append(Slices(2500, 2500, min(math.ceil(2500 / world / codec.unit) * codec.unit, 2500), world))
    return found


def single(codec: Codec, x: Tensor, slices: Slices, residuals: Tensor | None) -> Tensor:
    """The payloads by the definition, slice by slice; gaps are not written."""
    out = torch.full((codec.wire_bytes_of(slices),), 0xAA, dtype=torch.uint8)
    stride, first = codec.wire_bytes(slices.length, slices.width), 0
    for number, part in enumerate(slices.of(x)):
        if part.numel() == 0:
            continue
        size = 0 if residuals is None else codec.residual_numel(part.numel(), slices.width)
        if residuals is None:
            payload = codec.encode_ref(part, slices.width)
        else:
            payload = codec.encode_residual_ref(part, residuals[first : first + size], slices.width)
        first += size
        out[number * stride : number * stride + payload.numel()] = payload
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_encode_slices_equals_single_calls(codec: Codec, dtype: torch.dtype) -> None:
    for slices in cuts(codec):
        x = tensor("normal", slices.numel, dtype, seed=slices.world)
        found = torch.full((codec.wire_bytes_of(slices),), 0xAA, dtype=torch.uint8)
        codec.encode_slices(x, slices, found)
        assert torch.equal(found, single(codec, x, slices, None)), slices
        if not codec.keeps_residuals:
            continue
        mine, expected = (x.new_zeros(codec.residual_numel_of(slices)) for _ in range(2))
        for _ in range(2):
            codec.encode_slices(x, slices, found, mine)
            assert torch.equal(found, single(codec, x, slices, expected)) and same(mine, expected), slices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_decode_slices_equals_single_calls(codec: Codec, dtype: torch.dtype) -> None:
    for slices in cuts(codec):
        payloads = single(codec, tensor("octaves", slices.numel, dtype), slices, None)
        out = torch.full((slices.numel,), 42.0, dtype=dtype)
        codec.decode_slices(payloads, slices, out)
        stride = codec.wire_bytes(slices.length, slices.width)
        for number, part in enumerate(slices.of(out)):
            payload = payloads[number * stride :][: codec.wire_bytes(part.numel(), slices.width)]
            expected = codec.decode_sum_ref([payload], part.numel(), dtype, slices.width) if part.numel() else part
            assert same(part, expected), (slices, number)


PAIRS = [
    (Rotated(4.5, 32), Rotated(5, 64)), (Rotated(2.5, 32), Rotated(3, 64)), (Uniform(4, 128), Uniform(8, 128)),
    (Uniform(4, 24), Uniform(5, 40)), (Spike(4, 64), Spike(4, 64)), (Spike(2, 32), Rotated(8, 1024)),
    (Microscaling("e2m1", 32), Uniform(8, 32)), (Rotated(4, 32), Microscaling("e4m3", 32)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("reduce", "gather"), PAIRS, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 77), (1, 40000), (7, 576), (17, 2880), (40, 80), (1, 0)])
def test_reduce_slices_equals_single_calls(
    reduce: Codec, gather: Codec, rows: int, width: int, dtype: torch.dtype
) -> None:
    numel = rows * width
    kinds = ("normal", "outlier", "one_sided")
    payloads = [reduce.encode_ref(tensor(kind, numel, dtype), width) for kind in kinds if numel]
    payloads = payloads or [torch.empty(0, dtype=torch.uint8)] * 3
    out, expected = torch.empty(numel, dtype=dtype), reduce.decode_sum_ref(payloads, numel, dtype, width or None)
    reduce.reduce_slices(payloads, out, width=width)
    assert same(out, expected)
    if numel == 0:
        return
    found = torch.full((gather.wire_bytes(numel, width),), 0xAA, dtype=torch.uint8)
    reduce.reduce_slices(payloads, out.zero_(), gather, found, width=width)
    assert same(out, expected) and torch.equal(found, gather.encode_ref(expected, width))
    if gather.keeps_residuals:
        mine, theirs = (expected.new_zeros(gather.residual_numel(numel, width)) for _ in range(2))
        for _ in range(2):
            reduce.reduce_slices(payloads, out, gather, found, mine, width)
            assert torch.equal(found, gather.encode_residual_ref(expected, theirs, width)) and same(mine, theirs)


@needs_extension
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce, gather = Rotated(4.5, 32), Rotated(5, 64)
    for slices in (Slices(700 * 2880, 2880, 234 * 2880, 3), Slices(2**21, 2**21, 2**20, 2)):
        x, results = torch.randn(slices.numel, generator=torch.Generator().manual_seed(0)).bfloat16(), []
        for threads in (1, 3, 16):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            payloads = torch.zeros(reduce.wire_bytes_of(slices), dtype=torch.uint8)
            reduce.encode_slices(x, slices, payloads)
            out, back = (torch.empty_like(x) for _ in range(2))
            reduce.decode_slices(payloads, slices, back)
            whole = reduce.encode(x, width=slices.width)
            sent = torch.zeros(gather.wire_bytes(x.numel(), slices.width), dtype=torch.uint8)
            reduce.reduce_slices([whole, whole], out, gather, sent, width=slices.width)
            results.append((payloads, back, out, sent))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- what a call costs -----------------------------------------------------------------------------------------------


def our_calls(call: Callable[[], Any]) -> tuple[int, int]:
    """Python functions of ours that ``call`` runs, and calls of the compiled extension."""
    ours = natives = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal ours, natives
        ours += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)
        natives += event == "c_call" and argument.__name__.endswith("_slices")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return ours, natives


@needs_extension
@pytest.mark.parametrize("world", [1, 2, 8])
def test_a_batch_is_one_native_call_and_few_of_ours(world: int) -> None:
    slices, reduce, gather = Slices(64 * 576, 576, 64 // world * 576, world), Rotated(4.5, 32), Rotated(5, 64)
    x = torch.randn(slices.numel)
    payloads = torch.empty(reduce.wire_bytes_of(slices), dtype=torch.uint8)
    residuals = x.new_zeros(reduce.residual_numel_of(slices))
    own = payloads[: reduce.wire_bytes(slices.length, 576)]
    out, sent = torch.empty(slices.length), torch.empty(gather.wire_bytes(slices.length, 576), dtype=torch.uint8)
    lost = torch.zeros(gather.residual_numel(slices.length, 576))
    for call in (
        lambda: reduce.encode_slices(x, slices, payloads, residuals),
        lambda: reduce.reduce_slices([own] * world, out, gather, sent, lost, 576),
        lambda: reduce.decode_slices(payloads, slices, x),
    ):
        call()  # sizes are computed once
        ours, natives = our_calls(call)
        assert natives == 1
        assert ours <= 20, f"{ours} of our calls"


@needs_extension
def test_few_frames_stand_above_native_code() -> None:
    """From a codec's method to compiled code; and few calls are made on the way."""
    depth = deepest = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal depth, deepest
        ours = frame.f_code.co_filename.startswith(PACKAGE)
        depth += (event == "call" and ours) - (event == "return" and ours)
        deepest = max(deepest, depth)

    codec, x = Rotated(4.5, 32), torch.randn(4096)
    out = codec.encode(x)
    sys.setprofile(watch)
    try:
        codec.encode(x, out)
    finally:
        sys.setprofile(None)
    assert deepest <= 4
    assert our_calls(lambda: codec.encode(x, out))[0] <= 12


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_wrong_batches_are_refused() -> None:
    codec, slices, x = Rotated(4.5, 32), Slices(8 * 64, 64, 256, 2), torch.zeros(512)
    out = torch.zeros(codec.wire_bytes_of(slices), dtype=torch.uint8)
    with pytest.raises(ValueError, match="encode: x has 511 numbers; expected 512"):
        codec.encode_slices(x[:511], slices, out)
    with pytest.raises(ValueError, match=r"encode: out has \d+ bytes; the codec's payload has \d+"):
        codec.encode_slices(x, slices, out[:-1])
    with pytest.raises(ValueError, match="encode: residual has 512 numbers; expected 1024"):
        codec.encode_slices(x, slices, out, torch.zeros(512))
    with pytest.raises(ValueError, match=r"decode: payloads has \d+ bytes"):
        codec.decode_slices(out[:-1], slices, x)
    with pytest.raises(ValueError, match=r"decode: out is torch\.float64"):
        codec.decode_slices(out, slices, x.double())
    payload = codec.encode(x, width=64)
    with pytest.raises(ValueError, match="reduce: payload has 3 bytes"):
        codec.reduce_slices([payload], x, Rotated(5, 64), out[:3], width=64)
    with pytest.raises(ValueError, match=r"reduce: residual is torch\.float16"):
        sent = torch.zeros(Rotated(5, 64).wire_bytes(512, 64), dtype=torch.uint8)
        codec.reduce_slices([payload], x, Rotated(5, 64), sent, torch.zeros(512, dtype=torch.float16), width=64)
