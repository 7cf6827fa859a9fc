"""Bytes that no encoder made: payloads and calibration files that are cut short, too long, changed or random."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcomm_megatron as fc
from flashcomm_megatron.codec.published import ranges
from flashcomm_megatron.codec.recipes import RECIPES

CONFIGS = [fc.Config(bits, recipe=name) for name, row in RECIPES.items() if not row.calibrated for bits in row.widths]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.recipe}-{config.bits}")
def test_a_payload_of_any_other_length_is_refused_and_any_of_the_right_one_decodes(config: fc.Config) -> None:
    generator = torch.Generator().manual_seed(config.bits)
    for numel, leg, dtype in itertools.product((1, 31, 1000), ("reduce", "gather"), DTYPES):
        length = fc.wire_bytes(numel, config, leg)
        whole = torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8)
        for wrong in (whole[:-1], whole[:0], torch.cat([whole, whole[:1]]), whole.float()):
            with pytest.raises(ValueError, match=f"decode: expected {length} bytes .*found {wrong.numel()} of"):
                fc.decode(wrong, (numel,), dtype, config, leg)
        assert fc.decode(whole, (numel,), dtype, config, leg).shape == (numel,)
        assert fc.decode(torch.full_like(whole, 255), (numel,), dtype, config, leg).shape == (numel,)


def calibration(path: Path) -> bytes:
    layers = {
        f"decoder.layers.{i}.mlp.linear_fc2": torch.tensor([-1.0, 1.0]).view(2, 1, 1).expand(2, 2, 8) for i in (0, 1)
    }
    ranges.save(str(path), layers, batches=3)
    return path.read_bytes()


def is_refused_or_whole(path: Path) -> None:
    ranges.load.cache_clear()
    try:
        found = ranges.load(str(path))
    except ValueError as error:
        assert str(error).startswith("--flash-comm-calibration"), error
        return
    for values in found.layers.values():
        assert values.dtype == torch.float32 and values.dim() == 3 and values.shape[:2] == (2, found.ranks)
        assert values.isfinite().all()


@settings(max_examples=150)
@given(data=st.data())
def test_a_changed_calibration_is_refused_in_one_sentence_or_whole(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("calibration") / "file"
    content = bytearray(calibration(path))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(content), len(content), len(content) // 2, len(content) - 1, 3]))
    path.write_bytes(bytes(content[:cut]))
    is_refused_or_whole(path)


LAYER = "decoder.layers.0.mlp.linear_fc2"
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "offsets beyond": lambda header: header[LAYER].update(data_offsets=[0, 1 << 40]),
    "offsets before": lambda header: header[LAYER].update(data_offsets=[-64, 64]),
    "offsets backwards": lambda header: header[LAYER].update(data_offsets=[128, 0]),
    "offsets as text": lambda header: header[LAYER].update(data_offsets=["0", "128"]),
    "a huge shape": lambda header: header[LAYER].update(shape=[1 << 40, 2, 8]),
    "a negative shape": lambda header: header[LAYER].update(shape=[2, -2, -8]),
    "another dtype": lambda header: header[LAYER].update(dtype="F64"),
    "no shape": lambda header: header[LAYER].pop("shape"),
    "metadata of another kind": lambda header: header.update(__metadata__=["format"]),
    "no number of ranks": lambda header: header["__metadata__"].pop("ranks"),
    "ranks that are none": lambda header: header["__metadata__"].update(ranks="many"),
    "an entry that is none": lambda header: header.update({LAYER: None}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_hostile_header_is_refused_in_one_sentence(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = calibration(path)
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    ranges.load.cache_clear()
    with pytest.raises(ValueError, match=r"^--flash-comm-calibration"):
        ranges.load(str(path))


def test_ranges_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for low, high in ((float("nan"), 1.0), (0.0, float("inf"))):
        path = tmp_path / f"{low}{high}"
        ranges.save(str(path), {LAYER: torch.tensor([low, high]).view(2, 1, 1).expand(2, 2, 8)}, batches=1)
        with pytest.raises(ValueError, match=r"^--flash-comm-calibration"):
            ranges.load(str(path))
