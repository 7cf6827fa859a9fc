"""The planner: its bytes are the collectives' own, its arithmetic is checked by hand, its word against others' figures.

Every figure of planner/published.py is asserted: to hold within 20 %, or to be listed as a miss, in the code and in
docs/planner.md alike.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from specification import CALL

from flashcomm_megatron import collectives
from flashcomm_megatron.collectives import algorithms
from flashcomm_megatron.collectives.plan import Plan, plan
from flashcomm_megatron.comm import simulated
from flashcomm_megatron.comm.simulated import Simulated
from flashcomm_megatron.config import Config
from flashcomm_megatron.tools.plan import command as plan_command
from flashcomm_megatron.tools.plan import nodes, published, sweep
from flashcomm_megatron.tools.plan.cost import (
    Codec,
    Computing,
    Message,
    Streaming,
    assumed_speed,
    pieces,
    plan_of,
    predict,
    seconds,
    wire_bytes,
    work,
)
from flashcomm_megatron.tools.plan.hardware import GPUS, LINKS, Link, gpu, link
from flashcomm_megatron.tools.plan.inference import Job, infer
from flashcomm_megatron.tools.plan.models import MODELS, model

MIB = 2**20
FREE = Computing(math.inf, math.inf)
LINK = Link(1e9, "here", 0.0, "here", codec_latency=0.0, step=1e-3)
FIGURES = published.figures()


def codec(bits: int = 4, speed: Any = FREE, wire: str = "cuda", **options: Any) -> Codec:
    return Codec(Config(bits=bits, **{"min_bytes": 0, **options}), speed, wire)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def counted(message: Message, made: Plan) -> int:
    """Bytes that rank 0 hands to its peers when the collective really runs."""
    sent = []

    class Counting(Simulated):
        """Notes the messages of rank 0."""

        def exchange(self, outbox: Any, out_sizes: Any, *more: Any) -> Any:
            sent.extend(size for peer, size in enumerate(out_sizes) if peer != 0 == self.rank)
            return super().exchange(outbox, out_sizes, *more)

        def gather(self, inbox: Any, size: int, call: Any) -> Any:
            sent.extend([size] * (self.world - 1) * (self.rank == 0))
            return super().gather(inbox, size, call)

    def start(end: Simulated) -> algorithms.Steps:
        comm = Counting(end.rank, end.world, kind="cuda", mailbox=end._mailbox)
        x = torch.randn(message.numel).bfloat16()
        here = plan(message.collective, x.shape, x.dtype, x.device, comm, made.config)
        out = x if message.collective == "all_reduce" else collectives.output(message.collective, x, message.world)
        return collectives.ALGORITHMS[here.algorithm](x, out, here, CALL)

    simulated.run(start, message.world)
    return sum(sent)


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather"])
@pytest.mark.parametrize(("recipe", "bits"), [("auto", 4), ("flash-v1", 6), ("flash-v2", 2), ("mx", 4)])
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_those_that_travel(collective: str, recipe: str, bits: int, world: int) -> None:
    message = Message(collective, 10_000, world)
    plan = plan_of(message, codec(bits, recipe=recipe))
    assert wire_bytes(message, plan) == counted(message, plan)


@pytest.mark.parametrize(("numel", "kept"), [(MIB // 2 - 1, True), (MIB // 2, False)])
def test_the_real_policy_decides(numel: int, kept: bool) -> None:
    """A GPU's threshold is 1 MiB; below it the exact collective's time is predicted."""
    message = Message("all_reduce", numel, 4)
    default = codec(min_bytes=None)
    assert (plan_of(message, default).deferred is not None) == kept
    assert (seconds(LINK, message, default) == seconds(LINK, message, None)) == kept
    assert plan_of(message, codec(min_bytes=None, wire="shared memory")).deferred is None  # 1 KiB


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_predict_by_hand() -> None:
    """1 GB/s, 1 ms an exchange: 4 Mi values to 2 ranks, 8 MiB exact, 4.25 bits a value compressed."""
    message, what = Message("all_reduce", 4 * MIB, 2, times=3), codec(recipe="flash-v1", algorithm="two-step")
    assert predict(LINK, 2.0, [message]) == pytest.approx(2 + 3 * (2e-3 + 8 * MIB / 1e9))
    wire = 4 * MIB * 4.25 / 8
    assert predict(LINK, 2.0, [message], what) == pytest.approx(2 + 3 * (2e-3 + wire / 1e9))
    one = codec(recipe="flash-v1", algorithm="one-step")
    assert predict(LINK, 2.0, [message], one) == pytest.approx(2 + 3 * (1e-3 + wire / 1e9))


def test_codec_work_by_hand() -> None:
    """Two-step on 4 ranks: encode a tensor and a slice; decode as many values twice. CPUs count values, GPUs bytes."""
    message, what = Message("all_reduce", MIB, 4), codec(recipe="flash-v1")
    found, wire, nbytes = work(message, plan_of(message, what), what), MIB * 4.25 / 8, 2 * MIB
    assert found.encoded == nbytes * 1.25
    assert found.decoded == nbytes * 2
    assert found.encode_moved == (nbytes + wire) * 1.25
    assert found.decode_moved == (wire + nbytes / 4) + (wire + nbytes)
    assert Computing(1e9, 2e9).seconds(found) == found.encoded / 1e9 + found.decoded / 2e9
    assert Streaming(1e9, 2e9).seconds(found) == found.encode_moved / 1e9 + found.decode_moved / 2e9


def test_pieces_overlap() -> None:
    """Where sending takes longer than coding, only one piece of the coding is waited for."""
    message, what = Message("all_reduce", MIB, 2), codec(recipe="flash-v1", algorithm="one-step", wire="cpu")
    plan = plan_of(message, what)
    wire = wire_bytes(message, plan) / LINK.rate
    speed = Computing(6 * MIB / (wire / 2), 3 * 2 * MIB / (wire / 2))
    found = seconds(LINK, message, Codec(what.config, speed, "cpu"))
    coding = 2 * MIB / speed.encode + 4 * MIB / speed.decode
    assert found == pytest.approx(1e-3 + wire + coding / pieces(message, plan))


def test_one_step_decodes_every_rank() -> None:
    message, what = Message("all_reduce", MIB, 2), codec(recipe="flash-v1", algorithm="one-step")
    found = work(message, plan_of(message, what), what)
    assert (found.encoded, found.decoded) == (2 * MIB, 2 * 2 * MIB)


def test_feedback_reads_and_writes_residuals() -> None:
    message = Message("all_reduce", MIB, 4)
    auto = codec(recipe="auto")
    found = work(message, plan_of(message, auto), auto)
    payload = plan_of(message, auto).reduce.wire_bytes(MIB) + plan_of(message, auto).gather.wire_bytes(MIB // 4)
    assert found.encode_moved == 3 * found.encoded + payload


def test_a_switch_that_adds_is_taken_where_it_is_faster() -> None:
    """NVLS moves the tensor once: faster than a ring of 8, not than one of 2."""
    eight, two = (Message("all_reduce", 64 * MIB, world) for world in (8, 2))
    wires = link("nvlink4")
    assert wires.multicast is not None
    assert seconds(wires, eight, None) == wires.latency + eight.nbytes / wires.multicast
    assert seconds(wires, two, None) == wires.latency + two.nbytes / wires.rate


# ---- models and GPUs -------------------------------------------------------------------------------------------------

PARAMETERS = {"llama-2-7b": 6.74e9, "llama-2-70b": 69.0e9, "llama-3-8b": 8.03e9, "llama-3-70b": 70.6e9}
PARAMETERS |= {"llama-3.1-405b": 405.9e9, "mistral-7b": 7.24e9, "mistral-nemo-12b": 12.25e9, "qwen2.5-72b": 72.7e9}
PARAMETERS |= {"qwen3-32b": 32.8e9, "gpt-3-175b": 175e9, "llama-2-13b": 13.0e9}


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_their_published_sizes(name: str) -> None:
    assert MODELS[name].weights == pytest.approx(PARAMETERS[name], rel=0.01)


LLAMA_3 = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}


def test_a_config_json_is_the_built_in_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3))
    for name in (tmp_path, tmp_path / "config.json"):
        assert model(str(name)).weights == MODELS["llama-3-70b"].weights
        assert model(str(name)).cache_bytes(8, 1024) == MODELS["llama-3-70b"].cache_bytes(8, 1024)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "expected a JSON object, found list"),
        (json.dumps({**LLAMA_3, "model_type": "mixtral"}), "'mixtral' is not a dense decoder"),
        (json.dumps({"model_type": "llama", "num_attention_heads": 8}), "hidden_size or n_embd should be a positive"),
        (json.dumps({**LLAMA_3, "vocab_size": -1}), "vocab_size should be a positive integer, found -1"),
    ],
)
def test_a_bad_config_json_gives_a_sentence(
    tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    assert plan_command.main(["--gpu", "L40", "--model", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("row", [*LINKS.values(), *GPUS.values()])
def test_every_constant_has_a_source(row: Any) -> None:
    said = [value for name, value in vars(row).items() if name.endswith("source")]
    assert row.source and len(said) >= 2
    if isinstance(row, Link):
        assert bool(row.multicast) == bool(row.multicast_source) and bool(row.drain) == bool(row.drain_source)
    else:
        assert row.link in LINKS


def test_decoding_is_left_alone_and_prefill_is_not() -> None:
    row = gpu("l40")
    job = Job(row, link(row.link), model("llama-3-70b"), 4, 8, 1024)
    exact, packed = infer(job, None), infer(job, codec(speed=assumed_speed(row), min_bytes=None))
    assert packed.token == exact.token
    assert packed.ttft < exact.ttft


# ---- published figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.what)
def test_published_figures(figure: published.Figure) -> None:
    """Within 20 %, or listed as a miss: a miss that got better has to leave the list."""
    assert figure.holds == (figure.what not in published.MISSES), f"{figure.predict():.4g}, off by {figure.error:+.0%}"


def test_what_was_asked_of_the_planner_holds() -> None:
    """Flash Communication's three figures, none of which a constant was fitted to."""
    for start in ("all-reduce, L40", "time to first token, L40", "time to first token, A100"):
        figures = [figure for figure in FIGURES if figure.what.startswith(start)]
        assert figures and all(figure.holds and figure.role == "held out" for figure in figures)


def test_few_figures_are_fitted_and_most_others_hold() -> None:
    out = [figure for figure in FIGURES if figure.role == "held out"]
    assert len(FIGURES) - len(out) == 14
    assert sum(figure.holds for figure in out) >= 0.75 * len(out)
    assert {figure.what for figure in FIGURES} >= set(published.MISSES)


def test_the_page_lists_what_misses_and_no_more(root: Path) -> None:
    page = (root / "docs" / "planner.md").read_text()
    table = re.search(r"<!-- published -->\n(.*?)<!-- end -->", page, re.S)
    assert table is not None
    rows = [
        line.strip("| ").split(" | ") for line in table[1].splitlines() if line.startswith("| all") or "token" in line
    ]
    listed = {cells[0]: cells for cells in rows}
    assert set(listed) == {figure.what for figure in FIGURES}
    for figure in FIGURES:
        cells = listed[figure.what]
        assert cells[3] == f"{figure.error:+.0%}", "run python benchmarks/planner_page.py"
        assert (len(cells) > 5) == (figure.what in published.MISSES)


# ---- many nodes ------------------------------------------------------------------------------------------------------


def test_volume_through_a_card() -> None:
    """4.25 of 16 bits: flat sends 8 times what hierarchical does, which sends 4.25 / 16 of what the rings do."""
    cluster = nodes.Cluster(16, 8, link("nvlink4"), nodes.card_rate(400))
    found = {way.name: way for way in nodes.ways(cluster, 64 * MIB, codec(recipe="flash-v1"))}
    exact, flat, inside = (found[name].card_bytes for name in ("exact", "flat", "hierarchical, exact inside"))
    assert flat == pytest.approx(8 * inside)
    assert inside == pytest.approx(exact * 4.25 / 16 * (15 / 16) / (127 / 128))
    assert found["flat"].workspace == pytest.approx(2 * 64 * MIB * 4.25 / 8, rel=0.01)


@pytest.mark.parametrize(
    ("name", "gbits", "count", "fastest"),
    [
        ("H100", 400, 16, "hierarchical, compressed inside"),
        ("H100", 400, 128, "hierarchical, compressed inside"),
        ("H100", 400, 256, "exact"),
        ("H100", 25, 1024, "hierarchical, compressed inside"),
        ("L40", 25, 1024, "hierarchical, compressed inside"),
    ],
)
def test_where_hierarchical_wins(name: str, gbits: float, count: int, fastest: str) -> None:
    """What docs/planner.md says of 128 MiB in 4 bits."""
    row = gpu(name)
    cluster = nodes.Cluster(count, 8, link(row.link), nodes.card_rate(gbits))
    found = nodes.ways(cluster, 64 * MIB, codec(recipe="flash-v1", speed=assumed_speed(row)))
    assert min(found, key=lambda way: way.seconds).name == fastest


def test_doublings_end_where_asked() -> None:
    assert sweep.doublings(1) == [1]
    assert sweep.doublings(6) == [1, 2, 4, 6]


def test_pays_from() -> None:
    assert sweep.Line("", [1, 2, 4], [0.5, 2.0, 3.0]).pays_from == 2
    assert sweep.Line("", [1, 2, 4], [2.0, 0.9, 3.0]).pays_from == 4
    assert sweep.Line("", [1, 2], [2.0, 1.0]).pays_from is None
