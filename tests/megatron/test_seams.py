"""The seams in the installed Megatron-Core: TP=2 over gloo, against the codec's definition and Megatron's own results.

Everything runs once, on two ranks that import Megatron once, and returns what it saw; the tests look at that. No
tensor is below the threshold here, so anything reached by mistake would be compressed and seen.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import forks
import pytest
import torch
import torch.distributed as dist
from linears import HIDDEN, INNER, ROWS, WORLD, linear, normal, step
from ranks import once, tensor_parallel
from torch import Tensor

import flashcomm_megatron as fc
from flashcomm_megatron.megatron import context as where
from flashcomm_megatron.megatron import differentiable, patching, seams

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

CONFIG = fc.Config(bits=4, min_bytes=0, grad_bits=16)  # what gradients do: test_gradients.py
TOKENS, VOCABULARY = 16, 128

# name: (kind of layer, sequence parallelism, dtype, frozen weight)
LINEARS = {
    "row TP": ("row", False, torch.float32, False),
    "row TP bf16": ("row", False, torch.bfloat16, False),
    "row SP": ("row", True, torch.bfloat16, False),
    "column SP": ("column", True, torch.bfloat16, False),
    "column SP frozen": ("column", True, torch.float32, True),
}


def everything(rank: int, world: int) -> dict[str, Any]:
    """What one rank sees in every scenario."""
    tensor_parallel(world)
    seen: dict[str, Any] = {name: one_linear(rank, world, *row) for name, row in LINEARS.items()}
    seen |= {"training": mixture(sequence_parallel=True), "left alone": left_alone()}
    with torch.inference_mode():
        return seen | {"inference": mixture(sequence_parallel=False)}


seen = once(everything, WORLD, seconds=200, kind=forks.MEGATRON)


# ---- single layers --------------------------------------------------------------------------------------------------


def one_linear(
    rank: int, world: int, kind: str, sequence_parallel: bool, dtype: torch.dtype, frozen: bool
) -> dict[str, Any]:
    """One layer run exactly, quantized, and exactly again."""
    layer = linear(kind, sequence_parallel, dtype)
    layer.weight.requires_grad_(not frozen)
    short = ROWS // world if sequence_parallel else ROWS
    rows_in, rows_out = (ROWS, short) if kind == "row" else (short, ROWS)
    x = normal(rows_in, 1, INNER // world if kind == "row" else HIDDEN, dtype=dtype, seed=10 + rank)
    seed = 20 if kind == "row" and not sequence_parallel else 20 + rank  # replicated outputs have one gradient
    upstream = normal(rows_out, 1, HIDDEN if kind == "row" else INNER // world, dtype=dtype, seed=seed)
    runs = {"x": x, "weight": layer.weight.detach(), "upstream": upstream, "exact": step(layer, x, upstream)}
    fc.reset_stats()
    with fc.flashcomm(CONFIG):
        runs |= {"quantized": step(layer, x, upstream), "stats": fc.stats()}
    return runs | {"again": step(layer, x, upstream)}


def through_codec(x: Tensor, leg: str) -> Tensor:
    """float32 values of ``x`` after the codec."""
    return fc.decode(fc.encode(x, CONFIG, leg), x.shape, torch.float32, CONFIG, leg)


def promised(name: str, ranks: list[dict[str, Any]]) -> list[Tensor]:
    """What the codec promises every rank as output."""
    kind, sequence_parallel, dtype, _ = LINEARS[name]
    if kind == "column":
        total = gathered_input(ranks)
        return [torch.matmul(total, rank["weight"].t()) for rank in ranks]
    parts = [torch.matmul(rank["x"], rank["weight"].t()) for rank in ranks]
    pieces = [part.chunk(WORLD) if sequence_parallel else [part] * WORLD for part in parts]
    sums = [
        through_codec(first, "reduce") + through_codec(second, "reduce") for first, second in zip(*pieces, strict=True)
    ]
    return [total.to(dtype) for total in sums]


def gathered_input(ranks: list[dict[str, Any]]) -> Tensor:
    return torch.cat([through_codec(rank["x"], "gather").to(rank["x"].dtype) for rank in ranks])


@pytest.fixture(params=LINEARS)
def one(request: pytest.FixtureRequest, seen: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Name of a scenario and what each rank saw of it."""
    return request.param, [rank[request.param] for rank in seen]


def test_output_is_what_the_codec_promises(one: tuple[str, list[dict[str, Any]]]) -> None:
    name, ranks = one
    for rank, expected in zip(ranks, promised(name, ranks), strict=True):
        found = rank["quantized"]["y"]
        if name.startswith("row"):
            assert torch.equal(found, expected)
        else:  # a product of what was gathered: its last bits depend on where the tensors lie in memory
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (found - rank["exact"]["y"]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["row TP", "row TP bf16"])
def test_ranks_hold_the_same_bits(seen: list[dict[str, Any]], name: str) -> None:
    assert torch.equal(seen[0][name]["quantized"]["y"], seen[1][name]["quantized"]["y"])


def test_gradients_are_those_of_the_exact_collective(one: tuple[str, list[dict[str, Any]]]) -> None:
    name, ranks = one
    kind, _, _, frozen = LINEARS[name]
    for rank in ranks:
        assert torch.equal(rank["quantized"]["dgrad"], rank["exact"]["dgrad"])
        if frozen:
            assert rank["quantized"]["wgrad"] is None
        elif kind == "row":
            assert torch.equal(rank["quantized"]["wgrad"], rank["exact"]["wgrad"])


def test_the_weight_gradient_sees_the_input_that_forward_saw(seen: list[dict[str, Any]]) -> None:
    ranks = [rank["column SP"] for rank in seen]
    total = gathered_input(ranks).view(ROWS, HIDDEN)
    for rank in ranks:
        assert torch.equal(rank["quantized"]["wgrad"], rank["upstream"].view(ROWS, -1).t().matmul(total))
        assert not torch.equal(rank["quantized"]["wgrad"], rank["exact"]["wgrad"])


def test_everything_is_counted_and_only_gradients_deferred(one: tuple[str, list[dict[str, Any]]]) -> None:
    name, ranks = one
    for rank in ranks:
        assert rank["stats"]["quantized"] == (2 if name == "column SP" else 1)
        assert rank["stats"]["deferred"] == ({"gradients exact": 1} if "SP" in name else {})
        assert 0 < rank["stats"]["wire_bytes"] < rank["stats"]["exact_bytes"]


def test_disable_brings_exact_results_back(one: tuple[str, list[dict[str, Any]]]) -> None:
    for rank in one[1]:
        for name, value in rank["exact"].items():
            assert value is None or torch.equal(rank["again"][name], value)


# ---- a model with everything that must stay exact -------------------------------------------------------------------


def build_mixture(sequence_parallel: bool) -> Any:
    """Two layers, dense and mixture of experts with a shared expert, between an embedding and an output layer."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # some versions name it without Transformer Engine
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=96, num_moe_experts=4,
        moe_layer_freq=[0, 1], moe_router_topk=2, moe_aux_loss_coeff=0.01, moe_shared_expert_intermediate_size=32,
        moe_token_dispatcher_type="allgather", tensor_model_parallel_size=WORLD, sequence_parallel=sequence_parallel,
        use_cpu_initialization=True, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    return GPTModel(config, spec, VOCABULARY, TOKENS, position_embedding_type="rope").train(sequence_parallel)


class Recorder:
    """Notes what was about to be communicated and where, and what single modules received and returned."""

    def __init__(self, model: Any) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.compressed: list[tuple[str, str]] = []  # collective, layer
        self.dtypes: set[torch.dtype] = set()
        self.widths: set[int] = set()
        self.passed: list[str] = []  # collectives that reached a seam outside of every site
        self.io: dict[str, tuple[Any, Any]] = {}
        self.planned = differentiable.planned
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self.keep, name))

    def keep(self, name: str, module: Any, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        # Copies, because the loss works in place on the logits.
        self.io[name] = args, tuple(each.clone() if isinstance(each, Tensor) else each for each in outputs)

    def __call__(self, kind: str, collective: str, x: Tensor, *more: Any) -> Any:
        config, site = self.planned(kind, collective, x, *more), where.site()
        if config is None:
            self.passed.append(collective)
        else:
            self.compressed.append((collective, self.names[site.module].removeprefix("decoder.layers.")))
            self.dtypes.add(x.dtype)
            self.widths.add(x.shape[-1])
        return config


def mixture(sequence_parallel: bool) -> dict[str, Any]:
    """A model's forward and, in training, backward: what was compressed, and whether the rest equals exact results."""
    model = build_mixture(sequence_parallel)
    tokens = torch.arange(TOKENS).view(1, TOKENS)
    inputs = tokens, tokens, None
    embedded = model.embedding(tokens, tokens)
    recorder = Recorder(model)
    differentiable.planned, planned = recorder, differentiable.planned
    with fc.flashcomm(CONFIG):
        loss = model(*inputs, labels=tokens)
        forward = list(recorder.compressed)
        if sequence_parallel:
            loss.mean().backward()
    differentiable.planned = planned
    found = {"forward": forward, "backward": recorder.compressed[len(forward) :], "passed": recorder.passed}
    found |= {"dtypes": recorder.dtypes, "widths": recorder.widths, "finite": bool(loss.isfinite().all())}
    return found | exactness(model, recorder, embedded, loss, tokens)


def exactness(model: Any, recorder: Recorder, embedded: Tensor, loss: Tensor, tokens: Tensor) -> dict[str, bool]:
    """Whether modules that must stay exact returned what they return with flash-comm off, given the same input."""
    (hidden, *_), (logits, _) = recorder.io["output_layer"]
    routed, (probabilities, routing_map) = recorder.io["decoder.layers.1.mlp.router"]
    again = model.decoder.layers[1].mlp.router(*routed)
    exact_logits, _ = model.output_layer(hidden)
    exact_loss = model.compute_language_model_loss(tokens, logits.clone())
    return {
        "embedding": torch.equal(recorder.io["embedding"][1][0], embedded),
        "router probabilities": torch.equal(probabilities, again[0]),
        "router counts": torch.equal(routing_map, again[1]),
        "output layer": torch.equal(logits, exact_logits),
        "loss": torch.equal(loss, exact_loss),
    }


ROW_SITES = [
    "0.self_attention.linear_proj",
    "0.mlp.linear_fc2",
    "1.self_attention.linear_proj",
    "1.mlp.shared_experts.linear_fc2",
]
COLUMN_SITES = [
    "0.self_attention.linear_qkv",
    "0.mlp.linear_fc1",
    "1.self_attention.linear_qkv",
    "1.mlp.shared_experts.linear_fc1",
]


def test_training_compresses_the_transformers_linear_layers_and_nothing_else(seen: list[dict[str, Any]]) -> None:
    pairs = zip(COLUMN_SITES, ROW_SITES, strict=True)
    forward = [call for column, row in pairs for call in [("all_gather", column), ("reduce_scatter", row)]]
    for rank in seen:
        assert rank["training"]["forward"] == forward
        assert rank["training"]["backward"] == [("all_gather", column) for column in reversed(COLUMN_SITES)]


def test_inference_compresses_the_row_parallel_sums_and_nothing_else(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["inference"]["forward"] == [("all_reduce", row) for row in ROW_SITES]


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_what_must_stay_exact_does(seen: list[dict[str, Any]], mode: str) -> None:
    for rank in seen:
        found = rank[mode]
        exact = {
            name: found[name] for name in ("embedding", "router probabilities", "router counts", "output layer", "loss")
        }
        assert all(exact.values()), exact
        assert found["dtypes"] == {torch.float32} and found["widths"] == {64}  # hidden states: no ints, no logits
        assert found["passed"], "the embedding's collective never came by, so this proves nothing"
        assert found["finite"]


def left_alone() -> dict[str, bool]:
    """Layers that are no site: whether their forward reached none of our collectives, not even to be deferred."""
    found = {}
    alone = [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]  # experts not cut by tensor parallelism
    with fc.flashcomm(CONFIG):
        expert = linear("row", sequence_parallel=True, dtype=torch.float32, is_expert=True, tp_group=alone)
        fc.reset_stats()
        expert(normal(ROWS, 1, INNER, dtype=torch.float32, seed=1))
        found["expert row"] = fc.stats()["calls"] == 0
        for name, options in {"plain": {}, "output layer": {}, "expert": {"is_expert": True}}.items():
            layer = linear("column", sequence_parallel=True, dtype=torch.float32, **options)
            if name == "output layer":
                layer.weight.is_embedding_or_output_parameter = True
            fc.reset_stats()
            layer(normal(ROWS, 1, HIDDEN, dtype=torch.float32, seed=1))
            found[name] = fc.stats()["calls"] == 0
        fc.reset_stats()
        layer = linear("column", sequence_parallel=True, dtype=torch.float32)
        layer(normal(ROWS, 1, HIDDEN, dtype=torch.float32, seed=1), weight=layer.weight)
        found["weight handed in"] = fc.stats()["calls"] == 0
    return found


def test_output_layers_and_experts_are_no_sites(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["left alone"] == {
            "expert row": True,
            "plain": False,
            "output layer": True,
            "expert": True,
            "weight handed in": True,
        }


# ---- on and off -----------------------------------------------------------------------------------------------------


def bound() -> list[Any]:
    """The objects bound to every name of the table, staticmethod wrappers included."""
    return [patching.find(row)[2] for row in seams.SEAMS]


def test_disable_restores_every_object() -> None:
    before = bound()
    for _ in range(2):
        fc.enable(CONFIG)
        fc.enable(bits=8)
        assert all(new is not old for new, old in zip(bound(), before, strict=True))
        fc.disable()
        assert all(new is old for new, old in zip(bound(), before, strict=True))


def test_a_signature_that_drifted_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(layers, "reduce_from_tensor_model_parallel_region", lambda input_: input_)
    before = bound()
    with pytest.raises(RuntimeError) as raised:
        fc.enable(CONFIG)
    assert "reduce_from_tensor_model_parallel_region: expected parameters (input_, group, ...), found (input_)" in str(
        raised.value
    )
    assert bound() == before
    fc.disable()
