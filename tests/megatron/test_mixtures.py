"""Mixtures of experts, token prediction and parallel groups together: what is compressed, and that the rest is exact.

Real Megatron-Core models on four ranks over gloo, always TP=2. Every tensor is above the threshold, so whatever were
reached by mistake would be compressed and seen. A module that must stay exact is run again with flash-comm off, on the
input it was given while it was on, and has to return the same bits. Latent attention and Mamba need Transformer Engine
in Megatron 0.16 and are in test_transformer_engine.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import mixtures
import pytest
import torch
from mixtures import ATTENTION, DENSE, EXPERTS, TOKENS, Recorder, calls, recorded
from ranks import once
from specification import planned
from torch import Tensor

import flashcomm_megatron as fc
from flashcomm_megatron.megatron import installation, patching

# Not imported here: the ranks import this file before they switch CPU mode on.
pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

WORLD = 4
CONFIG = fc.Config(bits=4, min_bytes=0)
EXACT = ("embedding", "decoder.final_layernorm", "output_layer")
MOE = ("decoder.layers.1.mlp.router", "decoder.layers.1.mlp.experts")
# Without a capacity Megatron-Core takes every token to have its experts.
DROPPING = {"moe_token_dispatcher_type": "alltoall", "moe_expert_capacity_factor": 4.0}
BESIDE = {
    "moe_shared_expert_intermediate_size": 32,
    "moe_shared_expert_overlap": True,
    "moe_token_dispatcher_type": "alltoall",
}
# name: (parallel groups beside TP, builder, its options, modules that must be exact)
MODELS: dict[str, Any] = {
    "alltoall": ({}, mixtures.gpt, EXPERTS | {"moe_token_dispatcher_type": "alltoall"}, "decoder.layers.1.mlp"),
    "allgather": ({}, mixtures.gpt, EXPERTS | {"moe_token_dispatcher_type": "allgather"}, "decoder.layers.1.mlp"),
    "shared experts": ({}, mixtures.gpt, EXPERTS | {"moe_shared_expert_intermediate_size": 32}, None),
    "shared experts beside the dispatcher": ({}, mixtures.gpt, EXPERTS | BESIDE, None),
    "context and expert parallel": (
        {"context_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        mixtures.gpt,
        EXPERTS | {"moe_token_dispatcher_type": "alltoall", "attention": mixtures.Attention},
        "decoder.layers.1.mlp",
    ),
    "token prediction": ({}, mixtures.token_prediction, {}, None),
}


def everything(rank: int, world: int) -> dict[str, Any]:
    """What one rank sees of every model."""
    from flashcomm_megatron import cpu

    cpu.enable(force=True, scripts=True)
    from megatron.core.transformer.moe import token_dispatcher

    # On a CPU the counts stay tensors, which gloo's all-to-all does not take.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda x, as_numpy=False, **_: x.numpy() if as_numpy else x
    before, seen = bound(), {name: one_model(*row) for name, row in MODELS.items()}
    seen |= {"pipeline": pipeline(), "batch-invariant": batch_invariant(), "unevenly": unevenly()}
    return seen | {"restored": all(a is b for a, b in zip(before, bound(), strict=True))}


seen = once(everything, WORLD, seconds=230)


def bound() -> list[Any]:
    """The objects bound to every name of the tables."""
    return [patching.find(row)[2] for row in installation.rows()]


def groups(**sizes: int) -> Any:
    """Parallel groups anew: TP=2 and these."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, **sizes)
    model_parallel_cuda_manual_seed(1)
    return parallel_state


def tokens(parts: int = 1, part: int = 0) -> Tensor:
    return torch.arange(TOKENS).view(1, TOKENS).chunk(parts, dim=1)[part]


# ---- one model after the other --------------------------------------------------------------------------------------


def one_model(sizes: dict[str, int], build: Any, options: dict[str, Any], whole: str | None) -> dict[str, Any]:
    """A training step of one model in groups of these sizes."""
    state = groups(**sizes)
    ids = tokens(sizes.get("context_parallel_size", 1), state.get_context_parallel_rank())
    names = [*EXACT, *(MOE if "num_moe_experts" in options else ()), *([whole] if whole else [])]
    return mixtures.step(build(**options | sizes), ids, CONFIG, names)


SHARED = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
FIRST = [("0.", *ATTENTION), ("0.", *DENSE)]
PREDICTOR = "mtp.layers.0.transformer_layer."
# The column and row layers of each model, in the order in which they run; None: there is none.
SITES: dict[str, list[tuple[str, str, str | None]]] = {
    "alltoall": [*FIRST, ("1.", *ATTENTION)],
    "allgather": [*FIRST, ("1.", *ATTENTION)],
    "shared experts": [*FIRST, ("1.", *ATTENTION), ("1.", *SHARED)],
    "shared experts beside the dispatcher": [*FIRST, ("1.", *ATTENTION), ("1.", *SHARED)],
    "context and expert parallel": [*FIRST, ("1.", *ATTENTION)],
    "token prediction": [
        *FIRST,
        ("1.", *ATTENTION),
        ("1.", *DENSE),
        ("mtp.layers.0.", "eh_proj", None),
        (PREDICTOR, *ATTENTION),
        (PREDICTOR, *DENSE),
    ],
}


@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_are_compressed_and_nothing_else(seen: list[dict[str, Any]], name: str) -> None:
    sites = SITES[name]
    # Beside the dispatcher, shared experts gather once and keep the whole input for backward.
    again = sites[:-1] if name.endswith("beside the dispatcher") else sites
    for rank in (each[name] for each in seen):
        assert rank["forward"] == calls(sites, "all_gather", "reduce_scatter")
        assert sorted(rank["again"]) == sorted(calls(again, "all_gather", None))
        assert sorted(rank["gradients"]) == sorted(calls(sites, "reduce_scatter", "all_gather"))
        assert rank["dtypes"] == {torch.float32} and rank["finite"]


@pytest.mark.parametrize("name", MODELS)
def test_embedding_router_experts_dispatch_and_logits_are_exact(seen: list[dict[str, Any]], name: str) -> None:
    for rank in (each[name] for each in seen):
        assert all(rank["exact"].values()), rank["exact"]
        assert len(rank["exact"]) == (
            3 if name == "token prediction" else 5 if name.startswith("shared experts") else 6
        )


def test_disable_restores_every_object(seen: list[dict[str, Any]]) -> None:
    assert all(rank["restored"] for rank in seen)


# ---- pipeline -------------------------------------------------------------------------------------------------------


def pipeline() -> dict[str, Any]:
    """Two micro-batches through two stages: what this stage sent, was given and compressed."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    state = groups(pipeline_model_parallel_size=2)
    last = state.is_pipeline_last_stage()
    ends = {"pre_process": state.is_pipeline_first_stage(), "post_process": last}
    model = mixtures.gpt(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, **ends)
    received, sent, recorder, receive = [], [], Recorder(model), model.set_input_tensor

    def step(data: Any, model: Any) -> Any:
        out = model(tokens(), tokens(), None, labels=tokens() if last else None)
        sent.append(out.detach().clone())
        return out, lambda out: (out.mean(), {"loss": out.mean().detach()})

    def noted(given: Any) -> None:
        received.extend(mixtures.copies(given))
        receive(given)

    model.set_input_tensor = noted
    with recorded(recorder, CONFIG):
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=None, model=model, num_microbatches=2, seq_length=TOKENS,
            micro_batch_size=1, forward_only=False,
        )  # fmt: skip
    return {"received": received, "sent": sent, "forward": recorder.forward, "gradients": recorder.backward}


def test_stages_pass_exact_tensors_on(seen: list[dict[str, Any]]) -> None:
    for first, second in ((0, 2), (1, 3)):  # the ranks of a stage are neighbours
        sent, received = seen[first]["pipeline"]["sent"], seen[second]["pipeline"]["received"]
        assert len(sent) == len(received) == 2
        assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))


def test_every_stage_compresses_its_own_layers(seen: list[dict[str, Any]]) -> None:
    once = [*calls(FIRST, "all_gather", "reduce_scatter"), *calls(FIRST, "all_gather", None)]
    for rank in (each["pipeline"] for each in seen):
        assert sorted(rank["forward"]) == sorted(2 * once)
        assert sorted(rank["gradients"]) == sorted(2 * calls(FIRST, "reduce_scatter", "all_gather"))


# ---- modes ----------------------------------------------------------------------------------------------------------


def batch_invariant() -> dict[str, Any]:
    """A training step in batch-invariant mode, of a minimum size that no tensor reaches by default."""
    groups()
    model = mixtures.gpt()
    model.config.batch_invariant_mode = True  # its own checks ask for kernels of a GPU
    fc.reset_stats()
    with fc.flashcomm(bits=4, transport="group"):
        training_step(model)
    return {"stats": fc.stats(), "tokens": tokens_of_experts()}


def tokens_of_experts() -> dict[str, Any]:
    """Experts' tokens between ranks, asked for: compressed, in batch-invariant mode whatever the size."""
    groups(expert_model_parallel_size=2, expert_tensor_parallel_size=1)
    options = {"moe_token_dispatcher_type": "alltoall", "expert_model_parallel_size": 2}
    model, found = mixtures.gpt(**EXPERTS | options | {"expert_tensor_parallel_size": 1}), {}
    for mode in (False, True):
        model.config.batch_invariant_mode = mode
        fc.reset_stats()
        with fc.flashcomm(bits=4, min_bytes=None if mode else 0, grad_bits=16, experts=True, transport="group"):
            training_step(model)
        found[mode] = fc.stats()
    return found


def unevenly() -> dict[tuple[int, bool], list[tuple[Tensor, int]]]:
    """Loss and compressed calls of a step, exact and compressed; by how many of four experts get any, and recompute."""
    options = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    groups(**options)
    found = {}
    for experts, recompute in ((2, False), (2, True), (0, False), (0, True)):
        chosen = EXPERTS | options | DROPPING | (again if recompute else {})
        model = mixtures.gpt(**chosen)
        router = model.decoder.layers[1].mlp.router
        route = router.forward

        def to_some(*args: Any, route: Any = route, experts: int = experts, **kwargs: Any) -> tuple[Tensor, Tensor]:
            scores, mapping = route(*args, **kwargs)
            mapping = (torch.arange(mapping.size(1)) < experts).expand_as(mapping)
            return scores.softmax(-1) * mapping, mapping

        router.forward, steps = to_some, []
        for config in (None, fc.Config(bits=8, min_bytes=0, experts=True)):
            fc.reset_stats()
            with fc.flashcomm(config) if config else nullcontext():
                steps.append((training_step(model)[0].mean(), fc.stats()["quantized"]))
        found[experts, recompute] = steps
    return found


def test_ranks_whose_experts_get_no_tokens_step_with_the_others(seen: list[dict[str, Any]]) -> None:
    for rank in (each["unevenly"] for each in seen):
        for (_, recompute), ((exact, _), (found, quantized)) in rank.items():
            assert 0 < abs(found - exact) < 1e-3 and quantized == (27 if recompute else 19)


def training_step(model: Any) -> list[Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = model(tokens(), tokens(), None, labels=tokens())
    loss.mean().backward()
    return [loss.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


def test_batch_invariant_mode_asks_for_no_minimum_size(seen: list[dict[str, Any]]) -> None:
    for rank in (each["batch-invariant"] for each in seen):
        assert rank["stats"]["quantized"] > 0 and rank["stats"]["deferred"] == {}


def test_batch_invariant_mode_compresses_experts_tokens(seen: list[dict[str, Any]]) -> None:
    for rank in (each["batch-invariant"]["tokens"] for each in seen):
        for mode in (False, True):
            assert rank[mode]["quantized"] == 3 * 3 + 2  # three pairs of layers, and tokens there and back


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: what is no CPU has the thresholds of a GPU
@pytest.mark.parametrize("least", [None, 4096])
def test_capture_and_replay_decide_alike(monkeypatch: pytest.MonkeyPatch, device: str, least: int | None) -> None:
    """A plan is the same whether a graph is captured, gradients are recorded, or other calls came before."""
    config, sizes = fc.Config(bits=4, min_bytes=least), [2**power for power in range(24)]
    values = [torch.empty(size, dtype=torch.bfloat16, device=device) for size in sizes]

    def plans() -> list[Any]:
        return [planned("all_reduce", x, 2, config)._replace(comm=None, transport=None) for x in values]

    eager = plans()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.inference_mode():
        captured = plans()
    assert captured == eager
    deferred = [plan.deferred is not None for plan in eager]
    assert deferred == sorted(deferred, reverse=True) and deferred[0] and not deferred[-1]  # both, by size alone
