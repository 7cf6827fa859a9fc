"""Residual feedback in Megatron-Core: measured before it is used, off where it would do harm, freed, and worth it.

GPT models of Megatron's local layers on two ranks over gloo (support/structures.py). A structure is run exactly, with
feedback off, and twice with feedback auto: the first forward measures, the second is judged.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import forks
import pytest
import torch
from ranks import once, tensor_parallel
from specification import planned
from torch import Tensor, nn

import flashcomm_megatron as fc
from flashcomm_megatron.config import Config, set_current
from flashcomm_megatron.megatron import feedback, measure

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

WORLD = 2
AUTO, OFF = Config(bits=4, min_bytes=0), Config(bits=4, min_bytes=0, feedback="off")
# Under sequence parallelism the inputs of column-parallel layers are compressed as well, which no residual takes up.
ADDS_UP = {"pre-norm": 0.5, "pre-norm, sequence parallel": 0.8}
HARMED = (
    "norm behind the sums", "norm behind the sums, one branch x 8", "norms behind the sums only", "multiplier",
    "LayerScale", "gate", "LoRA", "norm behind the sums, sequence parallel",
)  # fmt: skip


def everything(rank: int, world: int) -> dict[str, Any]:
    """What one rank sees of every structure, and of one model in many situations."""
    tensor_parallel(world, scripts=True)
    import structures

    seen: dict[str, Any] = {}
    for name in (*ADDS_UP, *HARMED):
        kind, _, parallel = name.partition(", sequence")
        seen[name] = one_structure(structures.build(kind, world, bool(parallel)))
    model = structures.build("pre-norm", world)
    seen |= {"in turns": in_turns(model), "memory": memory(model), "modes": modes(model), "policies": policies(model)}
    seen |= {"run again": run_again(model), "changed between": changed_between(model)}
    return seen | {"token prediction": token_prediction(structures.build("pre-norm", world, mtp_num_layers=2))}


seen = once(everything, WORLD, seconds=500, kind=forks.MEGATRON)


def tokens(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(0, 128, (batch, 64), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stream(model: Any, ids: Tensor) -> Tensor:
    """The residual stream behind the last layer."""
    found: list[Tensor] = []
    hook = model.decoder.final_layernorm.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    model(ids, ids % 64, None)
    hook.remove()
    return found[0]


def one_structure(model: Any) -> dict[str, Any]:
    """Relative errors, what feedback was counted, and whether off and auto gave the same bits."""
    exact = stream(model, tokens())
    with fc.flashcomm(OFF):
        off = stream(model, tokens())
    with fc.flashcomm(AUTO):
        fc.reset_stats()
        first, counted = stream(model, tokens()), [fc.stats()["feedback"]]
        fc.reset_stats()
        auto = stream(model, tokens())
        counted.append(fc.stats()["feedback"])
    error = {name: ((each - exact).norm() / exact.norm()).item() for name, each in (("off", off), ("auto", auto))}
    return {"error": error, "counted": counted, "first": torch.equal(first, off), "same": torch.equal(auto, off)}


@pytest.mark.parametrize("name", ADDS_UP)
def test_where_sums_reach_the_stream_the_error_is_at_most_half_as_large(seen: list[dict[str, Any]], name: str) -> None:
    for rank in (each[name] for each in seen):
        assert rank["counted"] == [{feedback.MEASURING: 12}, {"on": 12}]
        assert rank["first"], "the forward that measures has no feedback"
        assert rank["error"]["auto"] <= ADDS_UP[name] * rank["error"]["off"], rank["error"]


@pytest.mark.parametrize("name", HARMED)
def test_where_they_do_not_nothing_is_lost(seen: list[dict[str, Any]], name: str) -> None:
    for rank in (each[name] for each in seen):
        (reason,) = rank["counted"][1]
        assert reason == "TransformerLayer does not add its sums unchanged"
        assert rank["same"] and rank["error"]["auto"] == rank["error"]["off"]


def in_turns(model: Any) -> dict[str, bool]:
    """Two batches through one model, layer by layer in turns, against each alone."""

    def start(seed: int) -> Tensor:
        return model.embedding(tokens(seed), tokens(seed) % 64)

    def alone(seed: int) -> Tensor:
        x = start(seed)
        for layer in model.decoder.layers:
            x, _ = layer(hidden_states=x, attention_mask=None)
        return x

    with torch.no_grad(), fc.flashcomm(AUTO):
        alone(1)  # measures
        expected = alone(1), alone(2)
        one, two = start(1), start(2)
        for layer in model.decoder.layers:
            one, _ = layer(hidden_states=one, attention_mask=None)
            two, _ = layer(hidden_states=two, attention_mask=None)
        fc.reset_stats()
        with fc.flashcomm(OFF):
            off = alone(1)
    return {"same": torch.equal(one, expected[0]) and torch.equal(two, expected[1]), "on": not torch.equal(one, off)}


def test_two_batches_in_turns_do_not_mix(seen: list[dict[str, Any]]) -> None:
    assert all(rank["in turns"] == {"same": True, "on": True} for rank in seen)


def memory(model: Any) -> dict[str, int]:
    """Streams that are kept: within a forward, after it, while somebody holds a layer's output, after disable()."""
    held: dict[str, int] = {}
    hook = model.decoder.layers[2].register_forward_pre_hook(lambda *_: held.update(inside=feedback.held()))
    with torch.no_grad(), fc.flashcomm(AUTO):
        model(tokens(), tokens() % 64, None)
        held.clear()
        model(tokens(), tokens() % 64, None)
        held["after"] = feedback.held()
        x = model.decoder.layers[0](hidden_states=model.embedding(tokens(), tokens() % 64), attention_mask=None)
        held["output kept"] = feedback.held()
    held["disabled"] = feedback.held()
    hook.remove()
    del x
    return held


def test_residuals_are_freed_behind_the_last_layer_and_by_disable(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["memory"] == {"inside": 1, "after": 0, "output kept": 1, "disabled": 0}


def modes(model: Any) -> dict[str, Any]:
    """What is counted in training, with gradients, and for a layer that runs alone."""
    found: dict[str, Any] = {}
    with fc.flashcomm(AUTO):
        for name, training, grad in (("training", True, True), ("gradients", False, True)):
            fc.reset_stats()
            with torch.set_grad_enabled(grad):
                model.train(training)(tokens(), tokens() % 64, None)
            found[name] = fc.stats()["feedback"]
        model.eval()
        fc.reset_stats()
        row = model.decoder.layers[0].mlp.linear_fc2
        with torch.no_grad():
            row(torch.ones(64, 1, row.input_size_per_partition))
        found["alone"] = fc.stats()["feedback"]
    return found


def test_off_with_a_reason(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["modes"] == {
            "training": {"training": 12},
            "gradients": {"gradients are recorded": 12},
            "alone": {"outside of a transformer layer": 1},
        }


def changed_between(model: Any) -> dict[str, int]:
    """What is counted where somebody halves the stream, in its place, between two layers."""
    hook = model.decoder.layers[2].register_forward_hook(lambda layer, args, output: (output[0].mul_(0.5), output[1]))
    with fc.flashcomm(AUTO):
        stream(model, tokens())  # measures
        fc.reset_stats()
        stream(model, tokens())
    hook.remove()
    return fc.stats()["feedback"]


def test_a_stream_that_is_changed_between_layers_is_noticed(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["changed between"] == {"on": 10, "TransformerLayer does not add its sums unchanged": 2}


def run_again(model: Any) -> dict[str, Any]:
    """Layers whose first forward, in a checkpoint, records no gradients though they are wanted: counts, same bits."""
    from megatron.core.tensor_parallel import checkpoint

    def layers(x: Tensor) -> Tensor:
        for layer in model.decoder.layers:
            x, _ = layer(hidden_states=x, attention_mask=None)
        passed.append(x.detach())
        return x

    passed: list[Tensor] = []
    x = model.embedding(tokens(), tokens() % 64)
    with fc.flashcomm(AUTO):
        stream(model, tokens())  # measures
        fc.reset_stats()
        checkpoint(layers, False, x).sum().backward()
    return {"counted": fc.stats()["feedback"], "same": torch.equal(*passed)}


def test_layers_that_are_run_again_do_the_same_again(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["run again"] == {"counted": {"gradients are recorded": 24}, "same": True}


def policies(model: Any) -> dict[str, Any]:
    """Logits of an old policy in evaluation mode against those of the training forward, by bits and feedback."""
    found: dict[str, Any] = {}
    ids = tokens()
    for bits in (4, 8):
        for choice in ("off", "auto"):
            with fc.flashcomm(bits=bits, min_bytes=0, feedback=choice):
                with torch.no_grad():
                    model.eval()(ids, ids % 64, None)
                    old = model(ids, ids % 64, None)
                new = model.train()(ids, ids % 64, None).detach()
            model.eval()
            found[f"{bits} {choice}"] = torch.equal(old.log_softmax(-1), new.log_softmax(-1))
    return found


def test_old_log_probabilities_equal_the_training_forwards_with_feedback_off(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["policies"] == {"4 off": True, "4 auto": False, "8 off": True, "8 auto": False}


def token_prediction(model: Any) -> dict[str, Any]:
    """Two depths of multi-token prediction: how many streams the depths and the decoder have, and what is counted."""
    streams: dict[int, set[int]] = {}
    asked = feedback.residuals

    def recorded(layer: nn.Module, *args: Any) -> Any:
        found = asked(layer, *args)
        if found is not None:
            streams.setdefault(id(found), set()).add(id(layer))
        kept.append(found)
        return found

    ids, kept = tokens(), []
    with torch.no_grad(), fc.flashcomm(AUTO):
        model(ids, ids % 64, None, labels=ids)
        feedback.residuals = recorded
        fc.reset_stats()
        model(ids, ids % 64, None, labels=ids)
        feedback.residuals = asked
    return {"streams": sorted(len(rows) for rows in streams.values()), "counted": fc.stats()["feedback"]}


def test_depths_of_token_prediction_do_not_share_residuals(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["token prediction"]["streams"] == [2, 2, 12]
        assert rank["token prediction"]["counted"] == {"on": 16}


# ---- what is measured -----------------------------------------------------------------------------------------------


def normal(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_rounding_is_no_difference_and_a_multiplier_is(dtype: torch.dtype, scale: float) -> None:
    x, one, two = normal(0).to(dtype), normal(1, scale).to(dtype), normal(2, scale).to(dtype)
    assert measure.adds_up(x, x + one + two, [one, two])
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert not measure.adds_up(x, x + factor * one + two, [one, two])


def test_what_cannot_be_measured_does_not_add_up() -> None:
    x, one = normal(0), normal(1)
    assert not measure.adds_up(x, x, [])
    assert not measure.adds_up(x, x, [torch.zeros_like(x)])
    assert not measure.adds_up(x, x + one, [one, one[:, :8]])
    assert not measure.adds_up(x, (x + one).fill_(float("nan")), [one])


def test_only_recipes_that_ask_for_it() -> None:
    fc.reset_stats()
    layer = nn.Linear(2, 2).eval()
    for config in (Config(bits=4, recipe="flash-v1", min_bytes=0), OFF):
        plan = planned("all_reduce", torch.zeros(2), 2, config)
        assert feedback.residuals(layer, torch.zeros(2), None, plan) is None
    assert fc.stats()["feedback"] == {}
    set_current(None)
