"""The last sum of a model travels in more bits: which one it is, by what rule, on every rank alike, and counted.

GPT models of Megatron's local layers on two ranks over gloo (support/structures.py). They have six layers, too few for
the rule, so most of them ask for a width by name.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import forks
import pytest
import torch
from ranks import once, tensor_parallel
from specification import planned
from torch import Tensor

import flashcomm_megatron as fc
from flashcomm_megatron.config import Config
from flashcomm_megatron.megatron import feedback, last_sum, model

WORLD, LAST = 2, "decoder.layers.5.mlp.linear_fc2"
needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Config(bits=4), {6: 4, 14: 4, 15: 5, 30: 6, 32: 6, 80: 8}),
        (Config(bits=3), {6: 3, 30: 5, 80: 8}),
        (Config(bits=8), {80: 8}),
        (Config(bits=4, feedback="off"), {30: 6}),
        (Config(bits=4, last_bits=4), {6: 4, 80: 4}),
        (Config(bits=4, last_bits=8), {6: 8, 80: 8}),
        (Config(bits=4, recipe="flash-v1"), {80: 4}),
        (Config(bits=4, recipe="flash-v2"), {80: 4}),
    ],
)
def test_a_bit_more_for_every_fifteen_layers(config: Config, expected: dict[int, int]) -> None:
    assert {layers: config.last_sum(layers) for layers in expected} == expected


def test_a_value_of_the_whole_model_takes_at_most_a_thirtieth_of_a_bit() -> None:
    for bits in range(2, 9):
        for layers in range(1, 200):
            config, sums = Config(bits=bits), 2 * layers
            assert config.last_sum(layers) - bits <= sums / 30 + 1e-9


def test_widths_that_nobody_has_are_refused() -> None:
    for bits in (1, 3, 9, 16):
        with pytest.raises(ValueError, match="--flash-comm-last-bits"):
            Config(bits=4, last_bits=bits)
    with pytest.raises(ValueError, match="does nothing with recipe flash-v2"):
        Config(bits=4, recipe="flash-v2", last_bits=8)


def everything(rank: int, world: int) -> dict[str, Any]:
    """What one rank sees of models whose last sum has a width of its own."""
    tensor_parallel(world, scripts=True)
    import structures

    structures.STRUCTURES["LoRA behind"] = (structures.RowParallelLinear, structures.Adapted, 1.0)
    gpt = structures.build("pre-norm", world)
    seen: dict[str, Any] = {"found": found(gpt), "LoRA": found(structures.build("LoRA behind", world))}
    seen["token prediction"] = found(structures.build("pre-norm", world, mtp_num_layers=2))
    seen["experts"] = found(mixture(structures, world))
    seen["runs"] = {
        (choice, last, parallel): run(structures.build("pre-norm", world, parallel), choice, last)
        for choice in ("auto", "off")
        for last in (None, 8)
        for parallel in (False, True)
    }
    seen["shared"] = shared(structures, world)
    gpt.config.num_layers = 12  # as if these were the layers of a pipeline's first stage
    for store in (last_sum._depths, last_sum._entered):
        store.clear()
    return seen | {"first stage": found(gpt)}


def mixture(structures: Any, world: int) -> Any:
    """A model whose last layer ends in shared experts; what holds its layers is all that is asked of it."""
    gpt = structures.build("pre-norm", world)
    last = gpt.decoder.layers[5]
    last.mlp.shared_experts = torch.nn.Module()
    last.mlp.shared_experts.linear_fc2 = last.mlp.linear_fc2
    last.mlp.linear_fc2.is_expert = True
    del last.mlp.linear_fc2
    last.mlp.shared_experts.linear_fc2.is_expert = False
    return gpt


def shared(structures: Any, world: int) -> list[int | None]:
    """Bits of a row that all layers share, as each layer runs it; and of one in a layer without rows of that width."""
    gpt = structures.build("pre-norm", world)
    config, rows = Config(bits=4, last_bits=8), [layer.mlp.linear_fc2 for layer in gpt.decoder.layers]
    found = []
    for layer in gpt.decoder.layers:
        layer.mlp.linear_fc2 = rows[0]
        last_sum.entered(layer)
        found.append(last_sum.bits(config, rows[0]))
    narrow = structures.build("pre-norm", world)
    narrow.config.hidden_size = 1
    last_sum.entered(narrow.decoder.layers[5])
    return [*found, last_sum.bits(config, narrow.decoder.layers[5].mlp.linear_fc2)]


def found(gpt: Any) -> list[str]:
    """The names of the layers whose sums have a width of their own."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    config = Config(bits=4, last_bits=8)
    for layer in gpt.modules():
        if isinstance(layer, TransformerLayer):
            last_sum.entered(layer)
    return [name for name, row in model.row_layers(gpt.decoder).items() if last_sum.bits(config, row) == 8]


@torch.no_grad()
def run(gpt: Any, choice: str, last: int | None) -> dict[str, Any]:
    """The error of the residual stream behind the last layer, and what was counted in the second forward."""
    ids = torch.randint(0, 128, (2, 64), generator=torch.Generator().manual_seed(0))
    streams: list[Tensor] = []
    hook = gpt.decoder.final_layernorm.register_forward_pre_hook(lambda _, args: streams.append(args[0].clone()))
    gpt(ids, ids % 64, None)
    with fc.flashcomm(Config(bits=4, min_bytes=0, feedback=choice, last_bits=last)):
        for _ in range(2):
            fc.reset_stats()
            gpt(ids, ids % 64, None)
        stats = fc.stats()
    hook.remove()
    exact, _, stream = streams
    return {
        "stream": stream,
        "error": ((stream - exact).norm() / exact.norm()).item(),
        "last": stats["last_sums"],
        "feedback": stats["feedback"],
        "wire": stats["wire_bytes"],
    }


seen = once(everything, WORLD, seconds=300, kind=forks.MEGATRON)


@needs_megatron
def test_the_last_row_layer_of_the_last_layer_and_no_other(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["found"] == rank["LoRA"] == rank["token prediction"] == [LAST]
        assert rank["experts"] == ["decoder.layers.5.mlp.shared_experts.linear_fc2"]
        assert rank["first stage"] == []
        assert rank["shared"] == [None] * 7


@needs_megatron
@pytest.mark.parametrize("parallel", [False, True])
def test_its_error_falls_and_its_bytes_are_counted(seen: list[dict[str, Any]], parallel: bool) -> None:
    for rank in seen:
        for choice in ("auto", "off"):
            plain, wide = (rank["runs"][choice, last, parallel] for last in (None, 8))
            assert plain["last"] == {} and wide["last"] == {"8-bit": 1}
            assert plain["feedback"] == wide["feedback"]
            assert 0.02 < wide["wire"] / plain["wire"] - 1 < 0.09, "one of twelve sums takes 8 instead of 4.75 bits"
            if not parallel:  # gathers of inputs lose more, which nothing repays
                assert wide["error"] < plain["error"], choice


@needs_megatron
def test_ranks_agree(seen: list[dict[str, Any]]) -> None:
    for case, first in seen[0]["runs"].items():
        if not case[2]:
            assert torch.equal(first["stream"], seen[1]["runs"][case]["stream"])


def test_at_widths_where_its_blocks_are_others_the_reduce_leg_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1184 values a row the gather leg has blocks of 64 at 5 bits and of 32 at 7."""
    config, layer, x = Config(bits=4, min_bytes=0), torch.nn.Linear(1, 1).eval(), torch.randn(8, 1184)
    visit = feedback._Visit(layer, x, None)
    monkeypatch.setattr(feedback._here, "visit", visit, raising=False)
    monkeypatch.setitem(feedback._adds_up, layer, True)
    with torch.no_grad():
        before = feedback.residuals(layer, x, None, planned("all_reduce", x, 3, config))
        assert before is not None
        before.kept = {(0, leg): torch.ones(1) for leg in ("reduce", "across", "gather")}
        after = feedback.residuals(layer, x, None, planned("all_reduce", x, 3, config, legs=config.legs_of(6)))
    assert after is not None and list(after.kept) == [(0, "reduce"), (0, "across")]
