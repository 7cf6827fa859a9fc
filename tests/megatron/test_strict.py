"""What a user would not expect is said once and counted, and is an error on every rank where the run is strict."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import spawn

from flashcomm_megatron import collectives
from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.comm import shared_memory
from flashcomm_megatron.config import Config
from flashcomm_megatron.megatron import context as where
from flashcomm_megatron.megatron import differentiable
from flashcomm_megatron.observe import counters, messages
from flashcomm_megatron.observe.metrics import metrics

ON = {"min_bytes": 0, "transport": "group"}


def calls(config: Config) -> list[torch.Tensor]:
    """What is deferred: the first two as everybody expects, the last not."""
    expected = [torch.ones(100, dtype=torch.int64), torch.empty(0)]
    return [collectives.all_reduce(x, None, config) for x in (*expected, torch.ones(100, dtype=torch.float64))]


def deferrals(rank: int, world: int) -> tuple[list[str], dict[str, int], str, float]:
    said: list[str] = []
    logging.getLogger("flashcomm_megatron").addFilter(lambda record: said.append(record.getMessage()) or False)
    for _ in range(3):
        calls(Config(bits=4, **ON))
    with pytest.raises(RuntimeError, match=r"stays exact: dtype float64 \(--flash-comm-strict\)"):
        calls(Config(bits=4, strict=True, **ON))
    logged = metrics()["flash-comm/deferred-calls/dtype-float64"]
    return said, counters.stats()["deferred"], messages.summary(), logged


def test_a_surprising_deferral_is_said_once_counted_and_an_error_if_strict() -> None:
    for rank, (said, counted, summary, logged) in enumerate(spawn(deferrals, 2)):
        assert [text for text in said if "float64" in text] == (
            ["flash-comm: a collective stays exact: dtype float64"] if rank == 0 else []
        )
        assert counted == {"dtype int64": 4, "empty": 4, "dtype float64": 4} and logged == 4
        assert summary.endswith("left exact: 4 x dtype float64")


def fallback(rank: int, world: int, strict: bool) -> str:
    def full(size: int) -> shared_memory.Segment:
        raise OSError(28, "No space left on device")

    if rank == 1:
        shared_memory.create = full
    try:
        collectives.all_reduce(
            torch.ones(100), None, Config(bits=4, min_bytes=0, transport="shared-memory", strict=strict)
        )
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.skipif(extension.module() is None, reason="the extension is not built")
@pytest.mark.parametrize("strict", [False, True])
def test_a_transport_that_was_asked_for_and_falls_back(strict: bool) -> None:
    for text in spawn(fallback, 2, strict):
        assert ("transport shared-memory does not serve" in text and "No space left" in text) == strict, text


def test_what_only_the_original_can_do_is_counted() -> None:
    counters.reset_stats()
    site, reason = where.Site("row", torch.nn.Linear(1, 1), Config(bits=4)), "argument use_global_buffer"
    group = SimpleNamespace(size=lambda: 2)
    with where.at(site):
        assert differentiable.planned("column", "all_gather", torch.ones(8), group, reason) is None
        assert counters.stats()["deferred"] == {}
        assert differentiable.planned("row", "reduce_scatter", torch.ones(8), group, reason) is None
    assert counters.stats()["deferred"] == {reason: 1}
    with (
        where.at(site._replace(config=Config(bits=4, strict=True))),
        pytest.raises(RuntimeError, match="argument use_global_buffer"),
    ):
        differentiable.planned("row", "reduce_scatter", torch.ones(8), group, reason)
    counters.reset_stats()


def test_every_reason_is_expected_or_not() -> None:
    assert not dist.is_initialized()
    surprising = ("dtype float64", "no calibrated site", "FP8", "argument use_nccl_stream")
    assert not any(reason.startswith(messages.EXPECTED) for reason in surprising)
