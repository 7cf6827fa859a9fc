"""A profile shows our collectives by place and bytes."""

from __future__ import annotations

import re

import torch
from ranks import spawn
from torch.profiler import ProfilerActivity, profile

import flashcomm_megatron as fc

RANGE = re.compile(r"flash-comm all_reduce: (\d+) of (\d+) bytes")


def profiled(rank: int, world: int) -> tuple[list[tuple[int, int, int]], dict[str, int]]:
    """Calls, bytes sent and uncompressed bytes of every range that the profiler shows; and what was counted."""
    x, config = torch.randn(64, 256).bfloat16(), fc.Config(bits=4, min_bytes=0)
    fc.all_reduce(x, None, config)
    fc.reset_stats()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            fc.all_reduce(x, None, config)
    counted = fc.stats()
    fc.all_reduce(x, None, config)  # nobody is looking
    ranges = [(each.count, RANGE.fullmatch(each.key)) for each in found.key_averages()]
    return [(count, int(match[1]), int(match[2])) for count, match in ranges if match], counted


def test_a_profile_names_place_and_bytes() -> None:
    for ranges, counted in spawn(profiled, 2):
        assert ranges == [(3, counted["wire_bytes"] // 3, counted["exact_bytes"] // 3)]
        assert 0 < 3 * ranges[0][1] < ranges[0][2]
