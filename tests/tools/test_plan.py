"""What `plan` reckons with: its bytes are those of the number formats, its arithmetic is checked by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flashcomm_megatron as fc
from flashcomm_megatron.config import Config
from flashcomm_megatron.tools.plan import cluster
from flashcomm_megatron.tools.plan import command as plan_command
from flashcomm_megatron.tools.plan.cost import (
    Collective,
    Compression,
    Speed,
    codec_seconds,
    on_cpu,
    on_gpu,
    seconds,
    sent_bytes,
    value_bytes,
)
from flashcomm_megatron.tools.plan.hardware import GPUS, LINKS, Link, gpu, link
from flashcomm_megatron.tools.plan.models import MODELS, model
from flashcomm_megatron.tools.plan.printing import Curve
from flashcomm_megatron.tools.plan.serving import Job, times

MIB = 2**20
FREE = Speed(math.inf, math.inf)
LINK = Link(1e9, "here", 0.0, "here", codec_latency=0.0, step=1e-3)


def compression(bits: int = 4, speed: Speed = FREE, **options: Any) -> Compression:
    return Compression(Config(bits=bits, **{"min_bytes": 0, **options}), speed)


def sums(numel: int, world: int, times: int = 1) -> Collective:
    return Collective("all_reduce", numel, world, times)


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "bits"), [("auto", 4), ("auto", 3), ("flash-v1", 6), ("flash-v2", 2), ("mx", 4)])
def test_bytes_are_those_of_the_format(recipe: str, bits: int) -> None:
    config = Config(bits=bits, recipe=recipe, min_bytes=0)
    reduce, _ = value_bytes(config)
    assert MIB * reduce == fc.wire_bytes(MIB, config)


@pytest.mark.parametrize(
    ("kind", "world", "algorithm", "expected"),
    [
        ("all_reduce", 2, "auto", lambda reduce, gather: reduce),  # one-step
        ("all_reduce", 8, "auto", lambda reduce, gather: 7 / 8 * (reduce + gather)),
        ("all_reduce", 8, "one-step", lambda reduce, gather: 7 * reduce),
        ("all_reduce", 2, "two-step", lambda reduce, gather: 1 / 2 * (reduce + gather)),
        ("reduce_scatter", 8, "auto", lambda reduce, gather: 7 / 8 * reduce),
        ("all_gather", 8, "auto", lambda reduce, gather: 7 * gather),
    ],
)
def test_bytes_of_a_collective(kind: str, world: int, algorithm: str, expected: Any) -> None:
    what = compression(algorithm=algorithm)
    assert sent_bytes(Collective(kind, MIB, world), what) == pytest.approx(MIB * expected(*value_bytes(what.config)))


@pytest.mark.parametrize(("numel", "kept"), [(MIB // 2 - 1, True), (MIB // 2, False)])
def test_small_tensors_stay_exact(numel: int, kept: bool) -> None:
    """A GPU's minimum size is 1 MiB; below it the exact collective's time is predicted."""
    default = compression(min_bytes=None)
    assert (default.deferred(sums(numel, 4)) == "below 1048576 bytes") == kept
    assert (seconds(LINK, sums(numel, 4), default) == seconds(LINK, sums(numel, 4), None)) == kept
    assert not compression(min_bytes=0).deferred(sums(numel, 4))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_seconds_by_hand() -> None:
    """1 GB/s, 1 ms an exchange: 4 Mi values to 2 ranks, 8 MiB exact, 4.25 bits a value compressed."""
    message, what = sums(4 * MIB, 2, 3), compression(recipe="flash-v1", algorithm="two-step")
    assert seconds(LINK, message, None) == pytest.approx(3 * (2e-3 + 8 * MIB / 1e9))
    wire = 4 * MIB * 4.25 / 8
    assert seconds(LINK, message, what) == pytest.approx(3 * (2e-3 + wire / 1e9))
    one = compression(recipe="flash-v1", algorithm="one-step")
    assert seconds(LINK, message, one) == pytest.approx(3 * (1e-3 + wire / 1e9))


def test_codec_work_by_hand() -> None:
    """Two-step on 4 ranks: encode a tensor and a slice; decode as many values twice. CPUs count values, GPUs bytes."""
    wire, nbytes = MIB * 4.25 / 8, 2 * MIB
    by_values = compression(recipe="flash-v1", speed=Speed(1e9, 2e9, by_values=True))
    assert codec_seconds(sums(MIB, 4), by_values) == pytest.approx(nbytes * 1.25 / 1e9 + nbytes * 2 / 2e9)
    moved = compression(recipe="flash-v1", speed=Speed(1e9, 2e9))
    decoding = (wire + nbytes / 4) + (wire + nbytes)
    assert codec_seconds(sums(MIB, 4), moved) == pytest.approx((nbytes + wire) * 1.25 / 1e9 + decoding / 2e9)


def test_one_step_decodes_every_rank() -> None:
    what = compression(recipe="flash-v1", algorithm="one-step", speed=Speed(1e9, 1e9, by_values=True))
    assert codec_seconds(sums(MIB, 2), what) == pytest.approx((2 * MIB + 2 * 2 * MIB) / 1e9)


def test_feedback_reads_and_writes_residuals() -> None:
    speed = Speed(1e9, math.inf)
    reduce, gather = value_bytes(Config(bits=4))
    encoded = 2 * MIB * 1.25
    expected = 3 * encoded + MIB * reduce + MIB / 4 * gather
    assert codec_seconds(sums(MIB, 4), compression(speed=speed)) == pytest.approx(expected / 1e9)


def test_pieces_overlap() -> None:
    """Where sending takes longer than coding, only one piece of the coding is waited for."""
    wire = MIB * 4.25 / 8 / LINK.rate
    speed = Speed(6 * MIB / (wire / 2), 3 * 2 * MIB / (wire / 2), by_values=True)
    what = on_cpu(Config(bits=4, recipe="flash-v1", algorithm="one-step"), speed.encode, speed.decode)
    coding = 2 * MIB / speed.encode + 4 * MIB / speed.decode
    assert what.pieces(sums(MIB, 2)) == 2
    assert seconds(LINK, sums(MIB, 2), what) == pytest.approx(1e-3 + wire + coding / 2)
    assert seconds(LINK, sums(MIB, 2), replace(what, piece=0)) == pytest.approx(1e-3 + wire + coding)


def test_small_tensors_stay_exact_as_the_package_leaves_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Over NVLink the default minimum size is larger than over PCIe, unless --min-bytes says otherwise."""
    for name, options, gains in (("H100", [], False), ("H100", ["--min-bytes", "0"], True), ("L40", [], True)):
        assert plan_command.main(["--gpu", name, "--tp", "8", "--bits", "4", "--json", *options]) == 0
        exact, compressed = json.loads(capsys.readouterr().out)["rows"]
        assert (compressed["sent"] < exact["sent"]) == gains


def test_a_switch_that_adds_is_taken_where_it_is_faster() -> None:
    """NVLS moves the tensor once: faster than a ring of 8, not than one of 2."""
    eight, two = (sums(64 * MIB, world) for world in (8, 2))
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


def test_decoding_stays_exact_and_prefill_does_not() -> None:
    row = gpu("l40")
    job = Job(row, link(row.link), model("llama-3-70b"), 4, 8, 1024)
    exact, packed = times(job, None), times(job, on_gpu(Config(bits=4), row))
    assert packed.token == exact.token
    assert packed.ttft < exact.ttft


def test_a_training_step_by_hand() -> None:
    """Three times the products, and the sums twice: at the width asked for, and in backward at that of gradients."""
    row = gpu("l40")
    job = Job(row, link(row.link), model("llama-3-70b"), 8, 8, 1024)
    four, eight = (on_gpu(Config(bits=bits, grad_bits=8), row) for bits in (4, 8))
    forward, backward = (seconds(job.link, job.sums(1024), each) for each in (four, eight))
    assert times(job, four).training == pytest.approx(3 * job.prefill_seconds + forward + backward)
    assert times(job, None).training == pytest.approx(
        3 * job.prefill_seconds + 2 * seconds(job.link, job.sums(1024), None)
    )


# ---- many nodes ------------------------------------------------------------------------------------------------------


def test_volume_through_a_card() -> None:
    """4.25 of 16 bits: flat sends 8 times what hierarchical does, which sends 4.25 / 16 of what the rings do."""
    whole = cluster.Cluster(16, 8, link("nvlink4"), cluster.card_rate(400))
    found = {way.name: way for way in cluster.ways(whole, 64 * MIB, compression(recipe="flash-v1"))}
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
    whole = cluster.Cluster(count, 8, link(row.link), cluster.card_rate(gbits))
    found = cluster.ways(whole, 64 * MIB, on_gpu(Config(bits=4, recipe="flash-v1", min_bytes=0), row))
    assert min(found, key=lambda way: way.seconds).name == fastest


def test_pays_from() -> None:
    assert Curve("", [1, 2, 4], [0.5, 2.0, 3.0]).pays_from == 2
    assert Curve("", [1, 2, 4], [2.0, 0.9, 3.0]).pays_from == 4
    assert Curve("", [1, 2], [2.0, 1.0]).pays_from is None
