"""Layers by what they are in their model (names, the output layer), and calls that only the original may serve."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import forks
import mixtures
import pytest
import torch
import torch.distributed as dist
from ranks import spawn, tensor_parallel
from torch import Tensor, nn

import flashcomm_megatron as fc
from flashcomm_megatron import config
from flashcomm_megatron.megatron import context, coverage, model

WORLD = 2
CONFIG = fc.Config(bits=8, min_bytes=0)


class Holder(nn.Module):
    """A module with another one inside."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class MegatronModule(Holder):
    """Named as Megatron's base class."""


def test_a_layers_name_is_the_same_in_a_wrapped_model() -> None:
    layer = nn.Linear(1, 1)
    inner = MegatronModule(decoder=Holder(layers=nn.ModuleList([Holder(proj=layer)])))
    assert model.name(layer) == "decoder.layers.0.proj"
    wrapped = MegatronModule(module=MegatronModule(module=inner))
    outside = Holder(policy=wrapped)
    assert model.name(layer) == "decoder.layers.0.proj" and outside is not None


def test_a_layer_by_itself_is_called_by_its_class() -> None:
    assert model.name(nn.Linear(1, 1)) == "Linear"


def test_a_layer_that_replaced_one_of_a_model_built_before_has_its_whole_name() -> None:
    attention = Holder(proj=nn.Linear(1, 1))
    whole = MegatronModule(layers=nn.ModuleList([attention]))
    replacing = nn.Linear(1, 1)
    model.hold(attention, "proj", replacing)  # as torch tells of it
    attention.proj = replacing
    assert model.name(replacing) == "layers.0.proj" and whole is not None


def test_the_output_layer_is_known_by_its_place() -> None:
    output, other = nn.Linear(1, 1), nn.Linear(1, 1)
    whole = MegatronModule(module=Holder(output_layer=output, other=other))
    assert model.is_output_layer(output, None) and not model.is_output_layer(other, None)
    assert model.is_output_layer(other, torch.ones(1)) and whole is not None


class Unmarked(MegatronModule):
    """A model whose output layer, as it runs, is asked what it is."""

    def forward(self, x: Tensor) -> bool:
        return bool(model.is_output_layer(self.output_layer, None))


def test_the_output_layer_is_known_of_a_copy_and_where_the_garbage_collector_knows_nothing() -> None:
    before = Unmarked(output_layer=nn.Linear(1, 1))
    config.set_current(fc.Config(bits=4))
    coverage.start("8 names patched")
    assert before(torch.ones(1)) and copy.deepcopy(before)(torch.ones(1))
    built = Unmarked(output_layer=nn.Linear(1, 1))
    gc.freeze()
    try:
        assert built(torch.ones(1))
    finally:
        gc.unfreeze()
        coverage.stop()
        config.set_current(None)


# ---- on two ranks ---------------------------------------------------------------------------------------------------


def everything(rank: int, world: int) -> dict[str, Any]:
    """What one rank sees."""
    tensor_parallel(world, scripts=True)
    return {"output layer": output_layer(), "sums": sums(rank), "mistakes": mistakes(), "gradient": gradient(rank)}


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    """What each rank saw."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    return spawn(everything, WORLD, seconds=400, kind=forks.MEGATRON)


def compressed(gpt: Any) -> int:
    """Collectives compressed in a training step."""
    ids = torch.arange(mixtures.TOKENS).view(1, -1)
    fc.reset_stats()
    with fc.flashcomm(CONFIG):
        gpt(ids, ids, None, labels=ids).mean().backward()
    return int(fc.stats()["quantized"])


def output_layer() -> dict[str, int]:
    """The same model after everything that takes the mark off the output layer's weight."""
    found = {"as built": compressed(mixtures.gpt())}
    gpt = mixtures.gpt()
    state = {name: value.clone() for name, value in gpt.state_dict().items() if isinstance(value, Tensor)}
    gpt.load_state_dict(state, strict=False, assign=True)
    assert not getattr(gpt.output_layer.weight, "is_embedding_or_output_parameter", False)
    found["load_state_dict(assign=True)"] = compressed(gpt.requires_grad_())
    gpt = mixtures.gpt()
    values = {name: each.detach().clone() for name, each in gpt.named_parameters()}
    gpt.to("meta")
    gpt.to_empty(device="cpu")
    with torch.no_grad():
        for name, each in gpt.named_parameters():
            each.copy_(values[name])
            vars(each).pop("is_embedding_or_output_parameter", None)
    found["meta"] = compressed(gpt)
    gpt = mixtures.gpt()
    shard(gpt)
    found["FSDP2"] = compressed(gpt)
    return found


def shard(gpt: Any) -> None:
    """Fully shard over a data-parallel group of one rank, as Torch FSDP2 does it."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]
        mesh = DeviceMesh.from_group(alone, "cpu", mesh_dim_names=("dp",))
        for layer in gpt.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(gpt, mesh=mesh)


def test_the_output_layer_stays_exact_whatever_happened_to_its_weight(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        expected = rank["output layer"]["as built"]
        assert expected > 0 and set(rank["output layer"].values()) == {expected}, rank["output layer"]


def sums(rank: int) -> dict[str, bool]:
    """A row layer's sum of a tensor that is not contiguous, compressed and deferred, beside the exact one."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers

    group, x = parallel_state.get_tensor_model_parallel_group(), torch.arange(4096.0).view(64, 64).t() * (rank + 1)
    exact, found = 3 * torch.arange(4096.0).view(64, 64).t(), {}
    for name, least in (("compressed", 0), ("deferred", 1 << 20)):
        config = fc.Config(bits=8, min_bytes=least)
        with fc.flashcomm(config), context.at(context.Site("row", nn.Linear(1, 1), config)):
            total = layers.reduce_from_tensor_model_parallel_region(x, group)
        found[name] = bool(((total - exact).abs() < 0.02 * exact.abs().max()).all())
    return found


def test_a_tensor_that_is_not_contiguous_is_summed_whatever_its_size(seen: list[dict[str, Any]]) -> None:
    assert all(rank["sums"] == {"compressed": True, "deferred": True} for rank in seen)


def mistakes() -> dict[str, str]:
    """The error for a length that the ranks do not divide, without us and on both sides of the minimum size."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers

    group, x, found = parallel_state.get_tensor_model_parallel_group(), torch.ones(7, 64), {}

    def error() -> str:
        with pytest.raises(Exception) as raised:
            layers.reduce_scatter_to_sequence_parallel_region(x, group)
        return f"{raised.type.__name__}: {raised.value}"

    found["off"] = error()
    for name, least in (("above", 0), ("below", 1 << 20)):
        config = fc.Config(bits=8, min_bytes=least)
        with fc.flashcomm(config), context.at(context.Site("row", nn.Linear(1, 1), config)):
            found[name] = error()
    return found


def test_a_mistake_has_the_same_error_whatever_the_size(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert len(set(rank["mistakes"].values())) == 1 and "AssertionError" in rank["mistakes"]["off"]


def gradient(rank: int) -> bool:
    """Transformer Engine's asynchronous sum of a gradient that is not contiguous."""
    from megatron.core import parallel_state

    from flashcomm_megatron.megatron import transformer_engine

    def never(*args: Any) -> Any:
        raise AssertionError("the original was called")

    group, x = parallel_state.get_tensor_model_parallel_group(), torch.arange(4096.0).view(64, 64).t() * (rank + 1)
    config = fc.Config(bits=8, min_bytes=0)
    with context.at(context.Site("column", nn.Linear(1, 1), config)):
        total, handle = transformer_engine.all_reduce(never)(x, group, True)
    handle.wait()
    exact = 3 * torch.arange(4096.0).view(64, 64).t()
    return bool(((total - exact).abs() < 0.02 * exact.abs().max()).all())


def test_a_gradient_that_is_not_contiguous_is_summed(seen: list[dict[str, Any]]) -> None:
    assert all(rank["gradient"] for rank in seen)
