"""A row stands alone: its bits after encoding, decoding and summing are those of the row by itself, in every format.

And the compiled codecs cut rows as the definition does, bit for bit, on every instruction set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from codec_cases import DTYPES, KINDS, same, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashcomm_megatron.codec import Codec, Microscaling, Rotated, Spike, Uncalibrated, Uniform
from flashcomm_megatron.codec import native as compiled
from flashcomm_megatron.codec.planes import rows_of
from flashcomm_megatron.codec.published.outlier import from_ranges
from flashcomm_megatron.codec.recipes import RECIPES

WIDTHS = (1, 7, 8, 20, 31, 33, 64, 80, 96, 100, 104, 130, 576, 960, 1056, 2112, 2880)
CODECS = sorted(
    {
        leg
        for recipe in RECIPES.values()
        for bits in recipe.widths
        for leg in recipe.legs(bits, recipe.block)
        if not isinstance(leg, Uncalibrated)
    },
    key=str,
)
ISAS = compiled.info().get("isas", [])


def outlier(width: int) -> Codec:
    """The calibrated format for rows of ``width`` features."""
    reach = torch.linspace(0.5, 4.0, width)[None]
    return from_ranges(-reach, reach, 0)


def decoded(codec: Codec, parts: list[Tensor], width: int, residuals: list[Tensor] | None = None) -> list[Tensor]:
    """The payloads, their decoded sum, and what the residuals have become."""
    lost = [None] * len(parts) if residuals is None else [each.clone() for each in residuals]
    payloads = [codec.encode(part, residual=each, width=width) for part, each in zip(parts, lost, strict=True)]
    out = codec.decode_sum(payloads, torch.empty_like(parts[0]), width)
    return [out, *(each for each in lost if each is not None)]


def check_rows(codec: Codec, parts: list[Tensor], rows: int, width: int, with_residuals: bool) -> None:
    """Every row of the sum of ``parts``, and of the residuals, has the bits of that row alone."""
    residuals = None
    if with_residuals and codec.keeps_residuals:
        size = codec.residual_numel(rows * width, width)
        generator = torch.Generator().manual_seed(width)
        filled = [torch.randn(width * rows, generator=generator).to(part.dtype) for part in parts]
        residuals = [torch.zeros(size, dtype=part.dtype) for part in parts]
        for each, residual in zip(filled, residuals, strict=True):  # residuals as an encoding leaves them
            codec.encode(each, residual=residual, width=width)
    together = decoded(codec, parts, width, residuals)
    for row in range(rows):
        alone = [part.view(rows, width)[row].clone() for part in parts]
        kept = None if residuals is None else [each.view(rows, -1)[row].clone() for each in residuals]
        for whole, part in zip(together, decoded(codec, alone, width, kept), strict=True):
            assert same(whole.view(rows, -1)[row], part), f"{codec}: row {row} of {rows} x {width}"


@settings(max_examples=150, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    width=st.one_of(st.sampled_from(WIDTHS), st.integers(1, 300)),
    rows=st.integers(1, 5),
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=5, max_size=5),
    ranks=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    with_residuals=st.booleans(),
)
def test_a_row_stands_alone(
    codec: Codec, width: int, rows: int, kinds: list[str], ranks: int, dtype: torch.dtype, with_residuals: bool
) -> None:
    parts = [
        torch.cat([tensor(kind, width, dtype, seed=rank) for kind in kinds[:rows]]) for rank in range(ranks)
    ]  # rows of every kind side by side
    check_rows(codec, parts, rows, width, with_residuals)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("width", [80, 100, 576])
def test_what_stands_beside_a_row_does_not_matter(codec: Codec, width: int) -> None:
    """The cases of issue reports: a neighbour 1e4 times larger, and one with a NaN."""
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    alone = codec.decode_sum([codec.encode(x[1].contiguous(), width=width)], torch.empty(width), width)
    for neighbour in (torch.randn(width) * 1e4, torch.full((width,), math.nan), torch.zeros(width)):
        batch = torch.stack([neighbour, x[1], neighbour]).flatten()
        out = codec.decode_sum([codec.encode(batch, width=width)], torch.empty_like(batch), width)
        assert same(out.view(3, width)[1], alone)


@pytest.mark.parametrize("width", [32, 80, 576])
def test_tokens_of_the_calibrated_format_stand_alone(width: int) -> None:
    codec, x = outlier(width), torch.randn(4 * width)
    check_rows(codec, [x], 4, width, with_residuals=False)


@pytest.mark.parametrize(
    "codec", [Rotated(4.5, 32), Rotated(5, 64), Rotated(8, 16), Uniform(4, 64), Spike(2, 64)], ids=str
)
def test_rows_of_whole_super_blocks_are_cut_as_one_row(codec: Codec) -> None:
    """Today's bytes where a row is a multiple of the super-block."""
    width = 32 * codec.block
    x, residuals = torch.randn(3 * width), [None, None]
    if codec.keeps_residuals:
        residuals = [torch.zeros(codec.residual_numel(3 * width, each)) for each in (width, None)]  # type: ignore[misc]
    assert torch.equal(codec.encode(x, None, residuals[0], width), codec.encode(x, None, residuals[1]))
    if codec.keeps_residuals:
        assert torch.equal(residuals[0], residuals[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", [*CODECS[::3], Microscaling("e2m1", 32)], ids=str)
def test_length_depends_on_the_shape_alone(codec: Codec) -> None:
    for width in WIDTHS:
        for rows in (1, 2, 5):
            assert codec.encode_ref(torch.ones(rows * width), width).numel() == codec.wire_bytes(rows * width, width)


def test_a_width_beyond_the_tensor_is_a_part_of_a_longer_row() -> None:
    assert rows_of(48, 96) == rows_of(48, None) == (1, 48)
    codec, x = Rotated(4.5, 64), torch.randn(48)
    assert torch.equal(codec.encode(x, width=4096), codec.encode_ref(x, 4096))
    assert codec.fitted(48) == Rotated(4.5, 16) and codec.fitted(4096) == codec


@pytest.mark.parametrize("width", [0, -4, 7, 64])
def test_rows_that_do_not_fill_the_tensor_are_refused(width: int) -> None:
    if width == 0:
        return  # as None
    with pytest.raises(ValueError, match=rf"width={width}: 100 values are not whole rows of it"):
        Uniform(4, 32).wire_bytes(100, width)


# ---- the block at a row's end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "width", "block"),
    [
        (Rotated(4.5, 32), 4096, 32),
        (Rotated(5, 64), 576, 64),
        (Rotated(5, 64), 2880, 64),
        (Rotated(4.5, 32), 80, 16),
        (Rotated(5, 64), 80, 16),
        (Rotated(4.5, 256), 960, 64),
        (Rotated(8, 1024), 3, 16),
    ],
    ids=str,
)
def test_blocks_fit_the_row(codec: Rotated, width: int, block: int) -> None:
    """The block that takes the fewest bytes for a row; what hidden sizes of real models need is what was asked for."""
    assert codec.fitted(width).block == block
    least = min(Rotated(codec.bits, each).wire_bytes(64 * width, width) for each in (16, 32, 64) if each <= codec.block)
    assert codec.wire_bytes(64 * width, width) <= least


# ---- compiled code equals the definition -----------------------------------------------------------------------------


@pytest.fixture
def isas() -> Iterator[list[str]]:
    """The instruction sets; the best one serves again afterwards."""
    if not ISAS:
        pytest.skip(f"no compiled codec: {compiled.reason()}")
    yield ISAS
    use(ISAS[0])


def use(isa: str) -> None:
    module = compiled.module()
    assert module is not None and module.use_isa(isa)


COMPILED = [
    *(Rotated(bits, 32) for bits in (2, 2.5, 4, 4.5, 8)), Rotated(5, 64), Rotated(7.5, 64), Rotated(3, 16),
    Rotated(4, 128), Uniform(4, 32), Uniform(5, 64), Uniform(8, 128), Uniform(3, 24), Spike(2, 64), Spike(4, 32),
    Spike(5, 40),
]  # fmt: skip


@pytest.mark.parametrize("codec", COMPILED, ids=str)
def test_compiled_codecs_cut_the_same_rows(codec: Codec, isas: list[str]) -> None:
    kinds = ("normal", "octaves", "strange"), ("outlier", "patterns", "signed_zeros")
    for number, width in enumerate(WIDTHS):
        rows = 5 if width < 1000 else 3
        for dtype, kind in zip(DTYPES, kinds[number % 2], strict=True):
            x = tensor(kind, rows * width, dtype, seed=width)
            zeros = [x.new_zeros(codec.residual_numel(x.numel(), width))] if codec.keeps_residuals else []
            expected = codec.encode_ref(x, width)
            summed = codec.decode_sum_ref([expected, expected], x.numel(), dtype, width)
            one = codec.decode_sum_ref([expected], x.numel(), dtype, width)
            lost = [each.clone() for each in zeros]
            kept = [codec.encode_residual_ref(x, each, width) for each in lost for _ in range(2)]
            for isa in isas:
                use(isa)
                where = f"{isa} {codec} {rows} x {width} {dtype} {kind}"
                payload = torch.full((codec.wire_bytes(x.numel(), width),), 0xAA, dtype=torch.uint8)
                assert torch.equal(codec.encode(x, payload, width=width), expected), where
                assert same(codec.decode_sum([expected], torch.empty_like(x), width), one), where
                assert same(codec.decode_sum([expected, expected], torch.empty_like(x), width), summed), where
                for each, after in zip(zeros, lost, strict=True):
                    mine = each.clone()
                    for payload in kept:
                        assert torch.equal(codec.encode(x, residual=mine, width=width), payload), where
                    assert same(mine, after), where


UNIFORM = [Uniform(bits, block) for bits in (5, 8) for block in (24, 32, 64)]


@pytest.mark.parametrize("codec", [Rotated(4.5, 32), Spike(4, 64), Spike(2, 64), Uniform(4, 128), *UNIFORM], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(400, 2880), (1, (3 << 18) + 77)])
def test_threads_do_not_change_the_result(
    codec: Codec, rows: int, width: int, isas: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tensor("octaves", rows * width, torch.bfloat16)
    payload = codec.encode_ref(x, width)
    total = codec.decode_sum_ref([payload, payload], x.numel(), x.dtype, width)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(codec.encode(x, width=width), payload)
        assert same(codec.decode_sum([payload, payload], torch.empty_like(x), width), total)


HIDDEN_SIZES = (64, 80, 100, 576, 960, 2880, 3584, 4096, 5120)
DESIGN = Path(__file__).resolve().parents[2] / "docs" / "design.md"


def bits_a_value(codec: Codec, width: int) -> str:
    """Of many rows, metadata included."""
    return f"{8 * sum(codec.section_bytes(64 * width, width)) / (64 * width):.2f}"


def table() -> str:
    """Bits a value of both legs at 4 bits, by hidden size; `auto` also as if blocks never fitted the row."""
    rows = [
        "| hidden size | `auto` | blocks | padded instead | `flash-v1` | `flash-v2` | `mx` |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for width in HIDDEN_SIZES:
        auto = RECIPES["auto"].legs(4, 32)
        padded = []
        for leg in auto:
            blocks = math.ceil(width / leg.block)
            bits = blocks * (leg.block * leg.bits + 8) + 16 * math.ceil(blocks / 32)  # type: ignore[attr-defined]
            padded.append(f"{bits / width:.2f}")
        cells = [" / ".join(bits_a_value(leg, width) for leg in auto)]
        cells += [" / ".join(str(leg.fitted(width).block) for leg in auto), " / ".join(padded)]
        cells += [
            bits_a_value(RECIPES[name].legs(4, RECIPES[name].block).reduce, width)
            for name in ("flash-v1", "flash-v2", "mx")
        ]
        rows.append(f"| {width} | {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_table_of_hidden_sizes_is_what_formats_take() -> None:
    """docs/design.md; replace the table there by what this prints."""
    print(table())
    assert table() in DESIGN.read_text()
