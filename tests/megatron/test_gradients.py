"""Gradients through the seams of backward: TP=2 over gloo, against the codecs' definition.

Single layers run once on two ranks that return what they saw. No tensor is below the threshold here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import forks
import pytest
import torch
import torch.distributed as dist
from linears import HIDDEN, INNER, ROWS, WORLD, linear, normal, step
from ranks import once, tensor_parallel
from torch import Tensor

import flashcomm_megatron as fc
from flashcomm_megatron import collectives
from flashcomm_megatron.collectives.handle import Handle
from flashcomm_megatron.megatron import context as where
from flashcomm_megatron.megatron import gradients

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

NEAREST = fc.Config(bits=4, grad_bits=6, min_bytes=0)
FIVE = fc.Config(bits=4, grad_bits=5, min_bytes=0)

# name: (kind of layer, sequence parallelism, dtype, frozen weight, configuration)
LINEARS: dict[str, tuple[str, bool, torch.dtype, bool, fc.Config]] = {
    "row TP": ("row", False, torch.float32, False, NEAREST),
    "row SP": ("row", True, torch.bfloat16, False, NEAREST),
    "row SP five bits": ("row", True, torch.float32, False, FIVE),
    "column TP": ("column", False, torch.float32, False, NEAREST),
    "column TP bf16": ("column", False, torch.bfloat16, False, NEAREST),
    "column TP five bits": ("column", False, torch.bfloat16, False, FIVE),
    "column TP frozen": ("column", False, torch.bfloat16, True, NEAREST),
    "column SP": ("column", True, torch.bfloat16, False, NEAREST),
    "column SP five bits": ("column", True, torch.float32, False, FIVE),
    "column SP frozen": ("column", True, torch.float32, True, NEAREST),
}
ALONE = [name for name in LINEARS if name != "row TP"]  # those that send a gradient


def everything(rank: int, world: int) -> dict[str, Any]:
    """What one rank sees in every scenario."""
    tensor_parallel(world)
    seen = {name: one_linear(rank, world, *row) for name, row in LINEARS.items()}
    return seen | {
        "infinite": infinite(rank),
        "fused": fused(rank),
        "overlapped": [overlapped(False), overlapped(True)],
        "output layer": output_layer(rank),
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: another number of threads may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


seen = once(everything, WORLD, seconds=200, kind=forks.MEGATRON)


def one_linear(
    rank: int, world: int, kind: str, sequence_parallel: bool, dtype: torch.dtype, frozen: bool, config: fc.Config
) -> dict[str, Any]:
    """One layer run exactly, compressed with exact gradients, compressed, and so once more."""
    layer = linear(kind, sequence_parallel, dtype)
    layer.weight.requires_grad_(not frozen)
    short = ROWS // world if sequence_parallel else ROWS
    rows_in, rows_out = (ROWS, short) if kind == "row" else (short, ROWS)
    width_in, width_out = (INNER // world, HIDDEN) if kind == "row" else (HIDDEN, INNER // world)
    x = normal(rows_in, 1, width_in, dtype=dtype, seed=10 + rank)
    upstream = normal(rows_out, 1, width_out, dtype=dtype, seed=20 + rank * (kind != "row" or sequence_parallel))
    runs = {"weight": layer.weight.detach(), "upstream": upstream, "exact": step(layer, x, upstream)}
    with fc.flashcomm(bits=4, min_bytes=0, grad_bits=16):
        runs["forward only"] = step(layer, x, upstream)
    fc.reset_stats()
    with fc.flashcomm(config):
        runs |= {"quantized": step(layer, x, upstream), "stats": fc.stats(), "twice": step(layer, x, upstream)}
    return runs


def through(x: Tensor, config: fc.Config, leg: str) -> Tensor:
    """float32 values of ``x`` after the codec that gradients have on ``leg``."""
    assert config.gradient_legs is not None
    codec = getattr(config.gradient_legs, leg)
    return codec.decode_sum([codec.encode(x.reshape(-1))], torch.empty(x.numel())).view(x.shape)


def promised(name: str, ranks: list[dict[str, Any]]) -> list[Tensor]:
    """What the codecs promise every rank as gradient of the input."""
    kind, sequence_parallel, dtype, _, config = LINEARS[name]
    if kind == "row":
        total = torch.cat([through(rank["upstream"], config, "gather").to(dtype) for rank in ranks])
        return [total.matmul(rank["weight"]) for rank in ranks]
    parts = [rank["upstream"].matmul(rank["weight"]) for rank in ranks]
    pieces = [part.chunk(WORLD) if sequence_parallel else [part] * WORLD for part in parts]
    return [
        (through(a, config, "reduce") + through(b, config, "reduce")).to(dtype) for a, b in zip(*pieces, strict=True)
    ]


@pytest.mark.parametrize("name", ALONE)
def test_the_inputs_gradient_is_what_the_codec_promises(seen: list[dict[str, Any]], name: str) -> None:
    ranks = [rank[name] for rank in seen]
    for rank, expected in zip(ranks, promised(name, ranks), strict=True):
        assert torch.equal(rank["quantized"]["dgrad"], expected)
        assert not torch.equal(rank["quantized"]["dgrad"], rank["exact"]["dgrad"])
        assert torch.equal(rank["forward only"]["dgrad"], rank["exact"]["dgrad"])
        assert torch.equal(rank["twice"]["dgrad"], rank["quantized"]["dgrad"])


def test_the_gradient_of_a_sum_is_the_gradient_itself(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for gradient in ("dgrad", "wgrad"):
            assert torch.equal(rank["row TP"]["quantized"][gradient], rank["row TP"]["exact"][gradient])


@pytest.mark.parametrize("name", [name for name in ALONE if name.startswith("column TP")])
def test_ranks_hold_the_same_bits(seen: list[dict[str, Any]], name: str) -> None:
    assert torch.equal(seen[0][name]["quantized"]["dgrad"], seen[1][name]["quantized"]["dgrad"])


@pytest.mark.parametrize("name", [name for name in ALONE if name.startswith("column") and "frozen" not in name])
def test_a_columns_weight_gradient_is_not_touched(seen: list[dict[str, Any]], name: str) -> None:
    for rank in seen:
        assert torch.equal(rank[name]["quantized"]["wgrad"], rank[name]["forward only"]["wgrad"])


@pytest.mark.parametrize("name", LINEARS)
def test_everything_is_counted_and_nothing_deferred(seen: list[dict[str, Any]], name: str) -> None:
    kind, sequence_parallel, _, frozen, _ = LINEARS[name]
    forward = sequence_parallel or kind == "row"
    again = sequence_parallel and kind == "column" and not frozen
    for rank in seen:
        assert rank[name]["stats"]["quantized"] == forward + again + (name != "row TP")
        assert rank[name]["stats"]["deferred"] == {}


# ---- what must not be lost ------------------------------------------------------------------------------------------


def infinite(rank: int) -> dict[str, bool]:
    """Whether the gradient of a column layer is NaN where one rank's upstream gradient overflowed."""
    found = {}
    for sequence_parallel in (False, True):
        layer = linear("column", sequence_parallel, torch.float16)
        x = normal(ROWS // WORLD if sequence_parallel else ROWS, 1, HIDDEN, dtype=torch.float16, seed=rank)
        upstream = normal(ROWS, 1, INNER // WORLD, dtype=torch.float16, seed=rank)
        upstream[:, 0, 0] = torch.inf if rank == 1 else 1.0
        with fc.flashcomm(NEAREST):
            gradients = step(layer, x, upstream)
        found["SP" if sequence_parallel else "TP"] = not bool(gradients["dgrad"].isfinite().any())  # type: ignore
    return found


def test_an_infinite_gradient_reaches_every_rank(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["infinite"] == {"TP": True, "SP": True}


class WeightGradient:
    """Stands in for apex's kernel: adds the weight's gradient to the buffer it is given, and notes when."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def wgrad_gemm_accum_fp32(self, x: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
        self.events.append("weight gradient")
        main_grad += gradient.t().float().matmul(x.float())


def fused(rank: int) -> dict[str, Tensor]:
    """Gradients with gradient_accumulation_fusion, twice accumulated, and without."""
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = WeightGradient([]), True
    layer = linear("column", False, torch.float32)
    x = normal(ROWS, 1, HIDDEN, dtype=torch.float32, seed=rank)
    upstream = normal(ROWS, 1, INNER // WORLD, dtype=torch.float32, seed=rank)
    with fc.flashcomm(NEAREST):
        plain = step(layer, x, upstream)
        layer.gradient_accumulation_fusion = True
        layer.weight.main_grad = torch.zeros_like(layer.weight)
        fused = [step(layer, x, upstream) for _ in range(2)][-1]
    return {"plain": plain["dgrad"], "fused": fused["dgrad"], "wgrad": plain["wgrad"], "main": layer.weight.main_grad}  # type: ignore


def test_gradient_accumulation_fusion_changes_nothing(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert torch.equal(rank["fused"]["fused"], rank["fused"]["plain"])
        assert torch.equal(rank["fused"]["main"], 2 * rank["fused"]["wgrad"])


def overlapped(sequence_parallel: bool) -> list[str]:
    """When a column layer's backward starts and awaits collectives, and computes the weight's gradient."""
    from megatron.core.tensor_parallel import layers

    events: list[str] = []

    def noting(original: Callable[..., Any], event: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            events.append(event)
            return original(*args, **options)

        return run

    layers.fused_weight_gradient_mlp_cuda = WeightGradient(events)
    layer = linear("column", sequence_parallel, torch.float32)
    layer.gradient_accumulation_fusion, layer.weight.main_grad = True, torch.zeros_like(layer.weight)
    x = normal(ROWS // WORLD if sequence_parallel else ROWS, 1, HIDDEN, dtype=torch.float32, seed=1)
    started, awaited = noting(Handle.__init__, "start"), noting(Handle.wait, "wait")
    patched = mock.patch.multiple(Handle, __init__=started, wait=awaited)
    with patched, fc.flashcomm(NEAREST):
        step(layer, x, normal(ROWS, 1, INNER // WORLD, dtype=torch.float32, seed=1))
    return events


def test_gradients_travel_while_the_weight_gradient_is_computed(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for events in rank["overlapped"]:
            assert events[-3:] == ["start", "weight gradient", "wait"]


def output_layer(rank: int) -> bool:
    """Whether the output layer's gradient is exact."""
    layer = linear("column", False, torch.float32)
    layer.weight.is_embedding_or_output_parameter = True
    x = normal(ROWS, 1, HIDDEN, dtype=torch.float32, seed=1)
    upstream = normal(ROWS, 1, INNER // WORLD, dtype=torch.float32, seed=rank)
    exact = step(layer, x, upstream)
    with fc.flashcomm(NEAREST):
        return all(torch.equal(a, b) for a, b in zip(exact.values(), step(layer, x, upstream).values(), strict=True))  # type: ignore


def test_the_output_layers_gradient_is_exact(seen: list[dict[str, Any]]) -> None:
    assert all(rank["output layer"] for rank in seen)


# ---- the options ----------------------------------------------------------------------------------------------------


class Group:
    """Notes what reaches the process group itself."""

    def __init__(self) -> None:
        self.reached: list[tuple[Any, ...]] = []

    def size(self) -> int:
        return 2

    def allreduce(self, *arguments: Any) -> str:
        self.reached.append(arguments)
        return "its own work"


def test_only_the_sum_of_one_contiguous_gradient_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[Tensor] = []
    monkeypatch.setattr(gradients, "planned", lambda *arguments: "a plan")
    monkeypatch.setattr(collectives, "run", lambda plan, x, **options: sums.append(x))
    group, x, options = Group(), torch.ones(8, 8), dist.AllreduceOptions()
    ours = gradients.Compressing(group, where.Site("column", torch.nn.Linear(1, 1), NEAREST))
    ours.allreduce([x], options)
    ours.allreduce([x])
    assert len(sums) == 2 and all(each is x for each in sums) and not group.reached
    fc.reset_stats()
    options.reduceOp = dist.ReduceOp.MAX
    for tensors, others in (([x], [options]), ([x], [dist.ReduceOp.MAX]), ([x.t()[:3]], []), ([x, x], [])):
        assert ours.allreduce(tensors, *others) == "its own work"
        assert group.reached[-1] == (tensors, *others)
    assert len(sums) == 2 and fc.stats()["deferred"] == {gradients.NOT_A_SUM: 4}
    fc.reset_stats()


def test_gradients_have_codecs_of_their_own_width() -> None:
    config = fc.Config(bits=4)
    assert config.gradient_legs == fc.Config(bits=8).legs
    assert fc.Config(bits=4, grad_bits=16).gradient_legs is None


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"grad_bits": 9}, "--flash-comm-grad-bits 9: choose 2, 3, 4, 5, 6, 7, 8 or 16 with recipe auto."),
        (
            {"grad_bits": 5, "recipe": "flash-v1"},
            "--flash-comm-grad-bits 5: choose 4, 6, 8 or 16 with recipe flash-v1.",
        ),
    ],
)
def test_what_no_recipe_knows_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as raised:
        fc.Config(bits=4, **options)
    assert str(raised.value).startswith(sentence)


def test_a_calibrated_recipe_sends_gradients_as_auto() -> None:
    config = fc.Config(bits=4, recipe="outlier", calibration="ranges.safetensors")
    assert config.gradient_legs == fc.Config(bits=8).legs
    assert partial(fc.Config, bits=4)(grad_bits=6).gradient_legs == fc.Config(bits=6).legs
