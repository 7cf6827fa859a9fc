"""Training with compressed gradients in Megatron's own loop: what must be equal is equal to the last bit.

TP=2 over gloo, two layers of a GPT with Megatron's optimizer (benchmarks/training_loop.py), gradients in 4 bits,
the setting with most to lose. Every scenario trains the same batches from the same weights.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from ranks import once
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from training_loop import Shape, Training, join

import flashcomm_megatron as fc

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

CONFIG = fc.Config(bits=4, grad_bits=4, min_bytes=0)
SHAPE = Shape(layers=2, hidden=64, ffn=96, heads=2, vocab=128, context=32, batch=4)
STEPS = 4
TEXT = torch.arange(4000) * 7 % 113
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
SCENARIOS: dict[str, dict[str, Any]] = {
    "TP": {},
    "TP float32": {"dtype": torch.float32},
    "TP recompute full": FULL,
    "TP recompute selective": SELECTIVE,
    "TP distributed optimizer": {"distributed_optimizer": True},
    "TP microbatches": {"shape": SHAPE._replace(microbatches=2)},
    "SP": {"sequence_parallel": True},
    "SP recompute full": FULL | {"sequence_parallel": True},
    "SP recompute selective": SELECTIVE | {"sequence_parallel": True},
}


def training(shape: Shape = SHAPE, **options: Any) -> Training:
    return Training(shape, 1, STEPS, **options)


def two_ranks(rank: int, world: int) -> dict[str, Any]:
    """What one rank sees of every scenario."""
    join(tensor=world)
    with fc.flashcomm(CONFIG):
        seen: dict[str, Any] = {name: trained(**options) for name, options in SCENARIOS.items()}
        seen |= {"gradients": [gradients(distributed_optimizer=each) for each in (False, True)]}
        seen |= {"TP again": trained(), "resumed": resumed(), "overflow": overflow()}
    return seen | {"exact": trained()}


def trained(**options: Any) -> dict[str, Any]:
    """Losses and weights after a few steps, and what was compressed."""
    run = training(**options)
    fc.reset_stats()
    return {"losses": [run.step(TEXT) for _ in range(STEPS)], "weights": weights(run), "stats": fc.stats()}


def gradients(**options: Any) -> dict[str, Tensor]:
    """What the optimizer is given at the first step."""
    run = training(**options)
    run.losses(TEXT, torch.arange(SHAPE.batch) * 9, forward_only=False)
    return {name: each.main_grad.clone() for name, each in run.model.named_parameters()}


def weights(run: Training) -> dict[str, Tensor]:
    """This rank's parameters by name; those that every rank holds whole under "replicated"."""
    return {
        ("" if getattr(each, "tensor_model_parallel", False) else "replicated ") + name: each.detach().clone()
        for name, each in run.model.named_parameters()
    }


def resumed() -> dict[str, Any]:
    """Losses of a run that was saved to a file half way, and continued by another object that knows only the file."""
    first = training()
    losses = [first.step(TEXT) for _ in range(STEPS // 2)]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(first.state(), f"{folder}/state.pt")
        del first
        second = training()
        second.load(torch.load(f"{folder}/state.pt", weights_only=False))
    losses += [second.step(TEXT) for _ in range(STEPS - STEPS // 2)]
    return {"losses": losses, "weights": weights(second)}


def overflow() -> dict[str, Any]:
    """Loss scale and whether weights moved, step by step, in float16 from a loss scale that is far too high."""
    run = Training(SHAPE, 1, 100, dtype=torch.float16)
    scaler = run.optimizer.chained_optimizers[0].grad_scaler
    scaler._scale.fill_(2.0**40)
    scales, moved = [], []
    for _ in range(2 * STEPS):
        before = weights(run)
        run.step(TEXT)
        scales.append(float(run.optimizer.get_loss_scale()))
        moved.append(any(not torch.equal(before[name], after) for name, after in weights(run).items()))
        if not moved[-1]:
            scaler._scale.mul_(2.0**-8)  # get there sooner
    return {"scales": scales, "moved": moved, "finite": all(w.isfinite().all() for w in weights(run).values())}


seen = once(two_ranks, 2, seconds=300, kind=forks.MEGATRON)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "name, like",
    [
        ("TP again", "TP"),
        ("TP recompute full", "TP"),
        ("TP recompute selective", "TP"),
        ("resumed", "TP"),
        ("SP recompute full", "SP"),
        ("SP recompute selective", "SP"),
    ],
)
def test_the_same_run_to_the_last_bit(seen: list[dict[str, Any]], name: str, like: str) -> None:
    for rank in seen:
        assert rank[name]["losses"] == rank[like]["losses"]
        assert same(rank[name]["weights"], rank[like]["weights"])


def test_the_distributed_optimizer_is_given_the_same_gradients(seen: list[dict[str, Any]]) -> None:
    for rank in seen:  # what it does with them differs in the last bit: Adam runs over one flat slice
        assert same(*rank["gradients"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_replicated_weights_stay_identical(seen: list[dict[str, Any]], name: str) -> None:
    first, second = ({key: w for key, w in rank[name]["weights"].items() if "replicated" in key} for rank in seen)
    assert len(first) == 2 * (2 * SHAPE.layers + 1) and same(first, second)


@pytest.mark.parametrize("name", SCENARIOS)
def test_it_learns_and_everything_is_compressed(seen: list[dict[str, Any]], name: str) -> None:
    sites = 2 * SHAPE.layers * STEPS * SCENARIOS[name].get("shape", SHAPE).microbatches
    forward, backward = (2, 3) if name.startswith("SP") else (1, 1)
    again = {"full": forward, "selective": forward / 2}.get(name.split()[-1], 0)  # half: the mlp's, of the two sites
    for rank in seen:
        found = rank[name]
        assert found["losses"][-1] < found["losses"][0] - 0.1
        assert found["losses"] != rank["exact"]["losses"]
        assert found["stats"]["deferred"] == {}
        assert found["stats"]["quantized"] == sites * (forward + backward + again)


def test_an_overflow_lowers_the_loss_scale_and_skips_the_step(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        found = rank["overflow"]
        assert found["moved"][0] is False and found["moved"][-1] is True and found["finite"]
        assert found["scales"][-1] < 2.0**40 and found["moved"] == sorted(found["moved"])
    assert seen[0]["overflow"] == seen[1]["overflow"]


# ---- four ranks: pipeline and data parallelism -----------------------------------------------------------------------


def four_ranks(rank: int, world: int) -> dict[str, Any]:
    """TP=2, the other two ranks being first a pipeline's second stage, then a second replica."""
    from megatron.core import parallel_state

    shape = SHAPE._replace(microbatches=2)
    join(tensor=2, pipeline=2)
    with fc.flashcomm(CONFIG):
        seen = {"piped": piped(training(shape, batch_p2p_sync=False))}
        parallel_state.destroy_model_parallel()
        join(tensor=2)
        return seen | {each: trained(shape=shape, distributed_optimizer=each) for each in (False, True)}


four = once(four_ranks, 4, seconds=300, kind=forks.MEGATRON)


def piped(run: Training) -> dict[str, Any]:
    """What the stage sent and received, in forward and backward, and what was compressed."""
    from megatron.core import parallel_state

    first = parallel_state.is_pipeline_first_stage()
    between: dict[str, list[Tensor]] = {"activations": [], "gradients": []}

    def note(x: Tensor) -> None:
        between["activations"].append(x.detach().clone())
        if x.requires_grad:
            x.register_hook(lambda gradient: between["gradients"].append(gradient.clone()))

    model = run.model.module.module
    if first:
        model.register_forward_hook(lambda module, args, output: note(output))
    else:
        model.decoder.register_forward_pre_hook(lambda module, args: note(model.decoder.input_tensor))
    fc.reset_stats()
    loss = run.step(TEXT)
    return {"first": first, "loss": loss, "stats": fc.stats(), **between}


def test_what_travels_between_pipeline_stages_is_not_touched(four: list[dict[Any, Any]]) -> None:
    stages = [rank["piped"] for rank in four]
    per_stage = 2 * (SHAPE.layers // 2) * 2 * 2  # sites, microbatches, forward and backward
    for rank in stages:
        assert rank["stats"]["quantized"] == per_stage and rank["stats"]["deferred"] == {}
    for sender, receiver in zip(stages[:2], stages[2:], strict=True):
        assert sender["first"] and not receiver["first"] and receiver["loss"] == receiver["loss"]
        for kind in ("activations", "gradients"):
            assert len(sender[kind]) == len(receiver[kind]) == 2
            assert all(torch.equal(a, b) for a, b in zip(sender[kind], receiver[kind], strict=True))


def test_data_parallel_replicas_hold_the_same_bits(four: list[dict[Any, Any]]) -> None:
    for one, other in zip(four[:2], four[2:], strict=True):
        for distributed in (False, True):
            assert one[distributed]["stats"]["deferred"] == {}
            assert one[distributed]["losses"] == other[distributed]["losses"]
            assert same(one[distributed]["weights"], other[distributed]["weights"])
        assert one[True]["losses"][0] == one[False]["losses"][0]
