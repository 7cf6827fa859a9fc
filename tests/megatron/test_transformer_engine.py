"""Megatron's Transformer Engine layers and inference-optimized layers, TP=2 over gloo, on a stand-in for the package.

The layers are those of the installed Megatron-Core; what they inherit from is ``stand_ins/transformer_engine``, which
has the real package's import layering; mamba_ssm has one as well. Everything runs once, on two ranks, and returns what
it saw.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mixtures
import pytest
import torch
import torch.distributed as dist
from mixtures import ATTENTION, DENSE, calls
from ranks import once, tensor_parallel
from torch import Tensor

import flashcomm_megatron as fc
from flashcomm_megatron import collectives
from flashcomm_megatron.megatron import installation, patching, seams

# Not imported here: the ranks import this file before they put the stand-in where Megatron finds it.
pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

WORLD = 2
CONFIG = fc.Config(bits=4, min_bytes=0, grad_bits=16)
GRADIENTS = fc.Config(bits=4, min_bytes=0, grad_bits=5)
ROWS, HIDDEN, INNER = 6, 96, 40

# name: (class, sequence parallelism)
LINEARS = {
    "row TP": ("TERowParallelLinear", False),
    "row SP": ("TERowParallelLinear", True),
    "column SP": ("TEColumnParallelLinear", True),
    "column TP": ("TEColumnParallelLinear", False),
    "norm column SP": ("TELayerNormColumnParallelLinear", True),
}
# name: (class, sequence parallelism, what is set on the layer, reason of the deferral)
ALONE = {
    "FP8": ("TEColumnParallelLinear", True, {"quantizer": torch.round}, "FP8"),
    "FP8 norm": ("TELayerNormColumnParallelLinear", True, {"quantizer": torch.round}, "FP8"),
    "user buffers": ("TEColumnParallelLinear", True, {"ub_overlap_ag_fprop": True}, "user-buffer overlap"),
    "user buffers in backward": ("TEColumnParallelLinear", True, {"ub_bulk_dgrad": True}, "user-buffer overlap"),
    "symmetric": ("TERowParallelLinear", False, {"symmetric_ar_type": "two_shot"}, "symmetric-memory all-reduce"),
}


def everything(rank: int, world: int) -> dict[str, Any]:
    """What one rank sees in every scenario."""
    sys.path[:0] = [
        str(Path(__file__).parents[1] / "support" / "stand_ins" / name) for name in ("transformer_engine", "mamba")
    ]
    tensor_parallel(world, scripts=True)
    names = bound()
    seen: dict[str, Any] = {"states": patching.status(installation.rows())}
    seen |= {name: one_linear(rank, *row) for name, row in LINEARS.items()}
    seen |= {name: left_alone(rank, *row) for name, row in ALONE.items()}
    seen |= {"no site": no_site(), "row feedback": feedback()} | models()
    with torch.inference_mode():
        seen |= {"optimized": optimized(rank)}
    return seen | {"restored": all(a is b for a, b in zip(names, bound(), strict=True))}


seen = once(everything, WORLD, seconds=200)


def bound() -> list[Any]:
    """The objects bound to every name of the tables."""
    return [patching.find(row)[2] for row in installation.rows()]


# ---- single layers --------------------------------------------------------------------------------------------------


def linear(name: str, sequence_parallel: bool, **options: Any) -> Any:
    """One of Megatron's layers over the stand-in, with the same weights in every run."""
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.tensor_parallel import inference_layers
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=WORLD,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=options.pop("dtype", torch.float32),
    )
    options = {"is_expert": False, "bias": False, "skip_bias_add": False} | options
    options |= {"config": config, "init_method": partial(torch.nn.init.normal_, std=0.3)}
    kind = getattr(extension, name, None) or getattr(inference_layers, name)
    if "Row" in name:
        return kind(INNER, HIDDEN, input_is_parallel=True, **options)
    return kind(HIDDEN, INNER, gather_output=False, **options)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rank: int, name: str, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    """A layer's input and the gradient of its output."""
    row, short = "Row" in name, ROWS // WORLD if sequence_parallel else ROWS
    x = normal(ROWS if row else short, 1, INNER // WORLD if row else HIDDEN, seed=10 + rank)
    upstream = normal(short if row else ROWS, 1, HIDDEN if row else INNER // WORLD, seed=20 + rank * sequence_parallel)
    return x, upstream


def step(layer: Any, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y, _ = layer(x)
    y.backward(upstream)
    return {"y": y.detach().clone(), "dgrad": x.grad, "wgrad": layer.weight.grad}  # type: ignore[dict-item]


def one_linear(rank: int, name: str, sequence_parallel: bool) -> dict[str, Any]:
    """One layer run exactly, quantized, and exactly again, with what our collectives make of its operands."""
    layer = linear(name, sequence_parallel)
    x, upstream = inputs(rank, name, sequence_parallel)
    runs = {"exact": step(layer, x, upstream), "promised": promised(layer, x, upstream, name, sequence_parallel)}
    fc.reset_stats()
    with fc.flashcomm(CONFIG):
        runs |= {"quantized": step(layer, x, upstream), "stats": fc.stats()}
    with fc.flashcomm(GRADIENTS):
        dgrad = step(layer, x, upstream)["dgrad"]
    runs["gradient"] = dgrad, promised_gradient(layer, upstream, name, sequence_parallel)
    return runs | {"again": step(layer, x, upstream)}


def promised(layer: Any, x: Tensor, upstream: Tensor, name: str, sequence_parallel: bool) -> dict[str, Tensor]:
    """The output, and a column layer's weight gradient, by our own collectives."""
    weight = layer.weight.detach()
    if "Row" in name:
        return {"y": (fc.reduce_scatter if sequence_parallel else fc.all_reduce)(x @ weight.t(), None, CONFIG)}
    normed = torch.nn.functional.layer_norm(x, (HIDDEN,)) if "Norm" in name else x
    if not sequence_parallel:
        return {}  # nothing is sent in forward
    total = fc.all_gather(normed, None, CONFIG)
    return {"y": total @ weight.t(), "wgrad": upstream.flatten(0, -2).t() @ total.flatten(0, -2)}


def promised_gradient(layer: Any, upstream: Tensor, name: str, sequence_parallel: bool) -> Tensor:
    """The input's gradient by our own collectives; without the norm's part in it."""
    legs, weight = GRADIENTS.gradient_legs, layer.weight.detach()
    if "Row" in name:
        whole = collectives.all_gather(upstream, None, GRADIENTS, legs=legs) if sequence_parallel else upstream
        return whole @ weight
    send = collectives.reduce_scatter if sequence_parallel else collectives.all_reduce
    return send(upstream @ weight, None, GRADIENTS, legs=legs)


@pytest.mark.parametrize("name", [name for name in LINEARS if name != "norm column SP"])
def test_gradients_travel_with_a_width_of_their_own(seen: list[dict[str, Any]], name: str) -> None:
    for rank in (each[name] for each in seen):
        found, expected = rank["gradient"]
        assert torch.equal(found, expected)
        assert torch.equal(found, rank["exact"]["dgrad"]) == (name == "row TP")  # whose gradient is not sent


def test_gradients_behind_a_norm_are_compressed(seen: list[dict[str, Any]]) -> None:
    for rank in (each["norm column SP"] for each in seen):
        assert not torch.equal(rank["gradient"][0], rank["exact"]["dgrad"])


@pytest.mark.parametrize("name", LINEARS)
def test_layers_send_what_our_collectives_send(seen: list[dict[str, Any]], name: str) -> None:
    for rank in (each[name] for each in seen):
        for what, expected in rank["promised"].items():
            assert torch.equal(rank["quantized"][what], expected), what
            assert not torch.equal(rank["exact"][what], expected), what
        assert rank["stats"]["quantized"] == len(rank["promised"])
        assert rank["stats"]["deferred"] == ({} if name == "row TP" else {"gradients exact": 1})
        assert (rank["stats"]["wire_bytes"] < rank["stats"]["exact_bytes"]) == bool(rank["promised"])


@pytest.mark.parametrize("name", LINEARS)
def test_gradients_of_inputs_are_exact_and_everything_is_after_disable(seen: list[dict[str, Any]], name: str) -> None:
    for rank in (each[name] for each in seen):
        assert torch.equal(rank["quantized"]["dgrad"], rank["exact"]["dgrad"])
        assert all(torch.equal(rank["again"][what], rank["exact"][what]) for what in rank["exact"])


def left_alone(rank: int, name: str, sequence_parallel: bool, given: dict[str, Any], reason: str) -> dict[str, Any]:
    """A layer that communicates by other means: its results with flash-comm off and on."""
    layer = linear(name, sequence_parallel)
    for attribute, value in given.items():
        setattr(layer, attribute, value)
    exact = step(layer, *inputs(rank, name, sequence_parallel))
    fc.reset_stats()
    with fc.flashcomm(CONFIG):
        found = step(layer, *inputs(rank, name, sequence_parallel))
    return {"equal": all(torch.equal(found[what], exact[what]) for what in exact), "stats": fc.stats()}


@pytest.mark.parametrize("name", ALONE)
def test_other_ways_of_communicating_are_left_alone_and_counted(seen: list[dict[str, Any]], name: str) -> None:
    reason = ALONE[name][-1]
    for rank in (each[name] for each in seen):
        assert rank["equal"] and rank["stats"]["quantized"] == 0
        gradients = rank["stats"]["deferred"].pop("gradients exact", 0)
        assert gradients == (1 if reason == "FP8" else 0)
        assert rank["stats"]["deferred"] == {reason: 2 if reason == "FP8" else 1}  # FP8: again for the weight gradient
        assert rank["stats"]["wire_bytes"] == rank["stats"]["exact_bytes"] > 0


def no_site() -> dict[str, int]:
    """Layers without communication of their own, or whose communication is not ours: how many calls were counted."""
    from megatron.core.extensions.transformer_engine import TELinear

    output_layer = linear("TEColumnParallelLinear", sequence_parallel=True)
    output_layer.weight.is_embedding_or_output_parameter = True
    expert = linear("TERowParallelLinear", sequence_parallel=True, is_expert=True)
    options = {"init_method": torch.nn.init.normal_, "bias": False, "skip_bias_add": False}
    options |= {"skip_weight_param_allocation": False, "config": expert.config}
    duplicated = TELinear(HIDDEN, INNER, parallel_mode="duplicated", **options)
    outside = linear("TEColumnParallelLinear", sequence_parallel=True)
    found = {}
    with fc.flashcomm(CONFIG):
        for name, layer, width in (
            ("output layer", output_layer, HIDDEN),
            ("expert", expert, INNER // WORLD),
            ("duplicated", duplicated, HIDDEN),
        ):
            fc.reset_stats()
            layer(normal(ROWS, 1, width, seed=1))
            found[name] = fc.stats()["calls"]
        fc.reset_stats()
        super(type(outside).__mro__[1], outside).forward(normal(ROWS, 1, HIDDEN, seed=1))
        found["not called by Megatron"] = fc.stats()["calls"]
    return found


def test_other_layers_are_no_sites(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["no site"] == {"output layer": 0, "expert": 0, "duplicated": 0, "not called by Megatron": 0}


def feedback() -> dict[str, int]:
    """Why a row layer by itself has no feedback, where gradients are recorded and where not; of two classes."""
    from megatron.core.extensions.transformer_engine import TELinear

    layer = linear("TERowParallelLinear", sequence_parallel=False).eval()
    options = {"init_method": torch.nn.init.normal_, "bias": False, "skip_bias_add": False, "config": layer.config}
    options |= {"skip_weight_param_allocation": False, "tp_group": layer.tp_group}
    plain = TELinear(INNER, HIDDEN, parallel_mode="row", **options).eval()
    fc.reset_stats()
    with fc.flashcomm(CONFIG):
        for each in (layer, plain):
            each(normal(ROWS, 1, INNER // WORLD, seed=1))
            with torch.no_grad():
                each(normal(ROWS, 1, INNER // WORLD, seed=1))
    return fc.stats()["feedback"]


def test_feedback_knows_whether_gradients_are_recorded(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["row feedback"] == {"gradients are recorded": 2, "outside of a transformer layer": 2}


# ---- models ---------------------------------------------------------------------------------------------------------

LATENT = ("self_attention.linear_q_up_proj", None), ("self_attention.linear_kv_up_proj", "self_attention.linear_proj")
GPT: Any = [(f"{layer}.", *pair) for layer in range(2) for pair in (ATTENTION, DENSE)]
# name: (builder, column and row layers in the order in which they run, the last norm)
MODELS: dict[str, Any] = {
    "training": (partial(mixtures.transformer_engine, True), GPT, "decoder.final_layernorm"),
    "latent attention": (
        mixtures.latent_attention,
        [(f"{layer}.", *pair) for layer in range(2) for pair in (*LATENT, DENSE)],
        "decoder.final_layernorm",
    ),
    "mamba": (mixtures.mamba, [("0.", "mixer.in_proj", "mixer.out_proj"), ("1.", *DENSE)], "decoder.final_norm"),
}


def models() -> dict[str, Any]:
    """What every model compresses, and whether what must stay exact does."""
    tokens = torch.arange(mixtures.TOKENS).view(1, -1)
    seen = {
        name: mixtures.step(build(), tokens, GRADIENTS, ["embedding", "output_layer", norm])
        for name, (build, _, norm) in MODELS.items()
    }
    with torch.inference_mode():
        gpt = mixtures.transformer_engine(sequence_parallel=False)
        exact = ["embedding", "output_layer", "decoder.final_layernorm"]
        return seen | {"inference": mixtures.step(gpt, tokens, CONFIG, exact, training=False)}


@pytest.mark.parametrize("name", MODELS)
def test_models_compress_their_linear_layers_and_nothing_else(seen: list[dict[str, Any]], name: str) -> None:
    sites = MODELS[name][1]
    for rank in (each[name] for each in seen):
        assert rank["forward"] == calls(sites, "all_gather", "reduce_scatter")
        assert sorted(rank["again"]) == sorted(calls(sites, "all_gather", None))
        assert sorted(rank["gradients"]) == sorted(calls(sites, "reduce_scatter", "all_gather"))
        assert rank["finite"] and all(rank["exact"].values()) and len(rank["exact"]) == 3


def test_inference_compresses_the_row_parallel_sums_and_nothing_else(seen: list[dict[str, Any]]) -> None:
    for rank in (each["inference"] for each in seen):
        assert rank["forward"] == calls(GPT, None, "all_reduce")
        assert all(rank["exact"].values()) and len(rank["exact"]) == 3


# ---- inference-optimized layers -------------------------------------------------------------------------------------


def optimized(rank: int) -> dict[str, Any]:
    """The inference-optimized layers, without and with the kernels that use symmetric memory."""
    from megatron.core.tensor_parallel import inference_layers

    def multimem_reduce_scatter(output: Tensor, x: Tensor, handle: Any) -> None:
        dist.reduce_scatter_tensor(output, x)

    buffer = SimpleNamespace(maybe_get_tensor=lambda shape, dtype: {"handle": None, "tensor": None})
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(major=9)  # type: ignore[assignment, misc]
    if hasattr(inference_layers, "get_global_symmetric_memory_buffer"):
        inference_layers.get_global_symmetric_memory_buffer = lambda: buffer
    else:  # from 0.17 on
        inference_layers.SymmetricMemoryManager.get_buffer = lambda *args, **options: buffer
        inference_layers.are_tensors_nvls_eligible = lambda *tensors: True
    inference_layers.multimem_reduce_scatter = multimem_reduce_scatter
    found = {}
    for name in ("InferenceRowParallelLinear", "InferenceLayerNormColumnParallelLinear"):
        layer = linear(name, sequence_parallel=True, dtype=torch.bfloat16).eval()
        x, _ = inputs(rank, name, True)
        found[name] = one_inference(layer, x.bfloat16())
    buffer.maybe_get_tensor = lambda shape, dtype: {"handle": 1, "tensor": torch.empty(shape, dtype=dtype)}
    row = linear("InferenceRowParallelLinear", sequence_parallel=True, dtype=torch.bfloat16).eval()
    return found | {"NVLS": one_inference(row, inputs(rank, "Row", True)[0].bfloat16())}


def one_inference(layer: Any, x: Tensor) -> dict[str, Any]:
    exact, _ = layer(x)
    fc.reset_stats()
    with fc.flashcomm(CONFIG):
        y, _ = layer(x)
    stats = fc.stats()
    return {"equal": torch.equal(y, exact), "promised": torch.equal(y, optimized_by_us(layer, x)), "stats": stats}


def optimized_by_us(layer: Any, x: Tensor) -> Tensor:
    if layer.parallel_mode == "row":
        return fc.reduce_scatter(torch.matmul(x, layer.weight.t()), None, CONFIG)
    from megatron.core.tensor_parallel.inference_layers import _te_rms_norm_kernel

    return fc.all_gather(_te_rms_norm_kernel(x, layer.layer_norm_weight, layer.eps), None, CONFIG) @ layer.weight.t()


def test_inference_optimized_layers_are_compressed_unless_nvls_serves(seen: list[dict[str, Any]]) -> None:
    for found in (rank["optimized"] for rank in seen):
        for name in ("InferenceRowParallelLinear", "InferenceLayerNormColumnParallelLinear"):
            assert found[name]["promised"] and not found[name]["equal"]
            assert found[name]["stats"]["quantized"] == 1 and found[name]["stats"]["deferred"] == {}
        assert found["NVLS"]["equal"] and found["NVLS"]["stats"]["quantized"] == 0
        assert found["NVLS"]["stats"]["deferred"] == {"NVLS kernel": 1}


# ---- on and off -----------------------------------------------------------------------------------------------------


def test_every_row_fits_and_disable_restores_every_object(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert all(state.startswith("fits") for _, state in rank["states"]) and rank["restored"]
        assert len(rank["states"]) > len(seams.SEAMS)


def test_without_the_package_there_is_no_such_row() -> None:
    assert not {*installation.rows()} & {*seams.TRANSFORMER_ENGINE}
