"""Parts of the accuracy lab that need no model: the formats of others, progress, the plot's front."""

from __future__ import annotations

import pytest
import torch

from flashcomm_megatron.tools.accuracy import plot, sweep
from flashcomm_megatron.tools.accuracy.baselines import Float8, Symmetric
from flashcomm_megatron.tools.accuracy.score import Score


@pytest.mark.parametrize("bits", [4, 6])
def test_quickreduce_is_its_published_format(bits: int) -> None:
    """The largest magnitude becomes the most negative code and comes back as float16 gives it; half a step elsewhere,
    a whole one at the other end, where the positive codes stop."""
    codec = Symmetric(bits)
    x = torch.randn(32 * 50, generator=torch.Generator().manual_seed(bits))
    out = codec.decode_sum([codec.encode(x)], torch.empty_like(x))
    blocks, found = x.view(-1, 32), out.view(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / (1 << (bits - 1))
    assert ((found - blocks).abs() <= step * 1.002).all()
    inner = blocks.abs() < step * ((1 << (bits - 1)) - 1.6)
    assert ((found - blocks).abs() <= step * 0.502)[inner].all()
    assert codec.wire_bytes(3072) == 3072 * bits / 8 + 2 * 96
    assert codec.decode_sum([codec.encode(torch.zeros(40))], torch.empty(40)).tolist() == [0.0] * 40


def test_float8_is_e4m3_in_blocks_of_128() -> None:
    codec = Float8()
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    out = codec.decode_sum([codec.encode(x)], torch.empty_like(x))
    for first in range(0, 1000, 128):
        part, found = x[first : first + 128], out[first : first + 128]
        least = part.abs().max() / 448 * 2**-10  # half of the smallest subnormal
        assert ((found - part).abs() <= torch.maximum(part.abs() / 16 * 1.001, least)).all()
    assert codec.wire_bytes(512) == 512 + 4 * 4
    assert codec.decode_sum([codec.encode(torch.zeros(40))], torch.empty(40)).tolist() == [0.0] * 40


def test_progress_is_said_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last step, and one line each half minute in between, with the time that is left."""
    now = 0.0
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now)
    progress = sweep.Progress(100)
    for _ in range(100):
        now += 2.0
        progress.advance(1, "window")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "accuracy: 1 of 100 forwards, window, about 3 min left"
    assert lines[1] == "accuracy: 16 of 100 forwards, window, about 3 min left"
    assert lines[-1] == "accuracy: 100 of 100 forwards, window, about 0 s left" and len(lines) == 8


def row(bits: float, rise: float) -> Score:
    return Score("auto", 4, 2, 32, bits, 3.0, rise, 1.0, 0.0, [], 0.0, [])


def test_the_front_is_what_nothing_beats() -> None:
    rows = [row(4, 0.5), row(5, 0.1), row(5, 0.2), row(6, 0.3), row(8, 0.01)]
    assert [each.wire_bits for each in plot.front(rows)] == [4, 5, 8]
