"""Residual feedback: what is handed back, when residuals are forgotten, where it is off, and that it pays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ranks import spawn
from torch import Tensor, nn

from flashcomm_megatron.codec import Rotated, rotated
from flashcomm_megatron.collectives import algorithms, all_reduce, reduce_scatter
from flashcomm_megatron.collectives import plan as policy
from flashcomm_megatron.collectives.algorithms import Residuals
from flashcomm_megatron.comm import simulated as lockstep
from flashcomm_megatron.config import Config
from flashcomm_megatron.megatron import feedback

AUTO = Config(bits=4, min_bytes=0)


class RowParallelLinear(nn.Module):
    """As much of Megatron's layer as feedback looks at; records the residuals it was handed."""

    is_expert = explicit_expert_comm = False

    def __init__(self, post_norm: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(apply_residual_connection_post_layernorm=post_norm)

    def forward(self, x: Tensor, config: Config) -> Tensor:
        self.seen = feedback.residuals(self, x, "group", config)
        return x


class Layer(nn.Module):
    def __init__(self, post_norm: bool) -> None:
        super().__init__()
        self.proj, self.fc2 = RowParallelLinear(post_norm), RowParallelLinear(post_norm)

    def forward(self, x: Tensor, config: Config) -> Tensor:
        return self.fc2(self.proj(x, config), config)


class Stack(nn.Module):
    def __init__(self, layers: int = 2, post_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(post_norm) for _ in range(layers))

    def forward(self, x: Tensor, config: Config = AUTO) -> Tensor:
        for layer in self.layers:
            x = layer(x, config)
        return x


class Pair(nn.Module):
    """Two stacks in one model, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(), Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@pytest.fixture(autouse=True)
def inference():
    feedback.reset_counts()
    with torch.no_grad():
        yield


def handed(model: nn.Module) -> list[Residuals | None]:
    """What the row layers were handed in the last forward, in order."""
    return [module.seen for module in model.modules() if isinstance(module, RowParallelLinear)]


def test_residuals_last_one_forward() -> None:
    model = Stack().eval()
    forwards = []
    for _ in range(2):
        model(torch.ones(3, 8))
        forwards.append(handed(model))
        assert isinstance(forwards[-1][0], Residuals)
        assert all(each is forwards[-1][0] for each in forwards[-1])
    assert forwards[0][0] is not forwards[1][0]


def test_a_forward_that_ended_early_leaves_nothing_behind() -> None:
    model, x = Stack().eval(), torch.ones(3, 8)
    model(x)
    first = handed(model)
    model.layers[0](x, AUTO)  # the rest of this forward never runs
    second = handed(model)
    model(x)
    third = handed(model)
    assert len({id(each) for each in (first[0], second[0], third[0])}) == 3
    assert len({id(each) for each in third}) == 1


@pytest.mark.parametrize("other", [torch.ones(4, 8), torch.ones(3, 8, dtype=torch.float16)])
def test_another_shape_or_dtype_starts_anew(other: Tensor) -> None:
    model = Stack().eval()
    model(torch.ones(3, 8))
    model.layers[0].proj(torch.ones(3, 8), AUTO)
    before = model.layers[0].proj.seen
    model.layers[0].fc2(other, AUTO)
    assert model.layers[0].fc2.seen is not before


def test_stacks_and_models_do_not_share() -> None:
    pair, single = Pair().eval(), Stack().eval()
    pair(torch.ones(3, 8))
    single(torch.ones(3, 8))
    assert len({id(each) for each in [*handed(pair), *handed(single)]}) == 3


def test_interleaved_forwards_keep_their_own() -> None:
    one, two = Stack(1).eval(), Stack(1).eval()
    x = torch.ones(3, 8)
    one(x), two(x)
    one.layers[0].proj(x, AUTO), two.layers[0].proj(x, AUTO), one.layers[0].fc2(x, AUTO)
    assert one.layers[0].fc2.seen is one.layers[0].proj.seen is not two.layers[0].proj.seen


def test_feedback_that_is_off_is_counted_with_its_reason() -> None:
    x = torch.ones(3, 8)
    Stack().train()(x)
    with torch.enable_grad():
        Stack().eval()(x)
    Stack(post_norm=True).eval()(x)
    shared = nn.ModuleDict({"shared_experts": Stack(1)})
    shared.forward = lambda x: shared["shared_experts"](x)  # type: ignore[method-assign]
    shared.eval()(x)
    assert feedback.counts() == {
        "training": 4,
        "gradients are recorded": 4,
        "the residual branch is normalized": 4,
        "shared experts": 2,
    }


def test_only_recipes_that_ask_for_it() -> None:
    model = Stack().eval()
    model(torch.ones(3, 8), Config(bits=4, recipe="flash-v1"))
    assert handed(model) == [None] * 4 and feedback.counts() == {}


# ---- what the collectives do with residuals ----------------------------------------------------------------------


def contribution(rank: int, step: int, shape: tuple[int, ...] = (6, 160)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + rank))


def drift(
    world: int, algorithm: str, steps: int, residuals: list[Residuals | None]
) -> tuple[Tensor, Tensor, policy.Plan]:
    """Sum of ``steps`` simulated all-reduces, the exact one, and the plan."""
    config = Config(bits=4, min_bytes=0, algorithm=algorithm)
    plan = policy.plan("all_reduce", contribution(0, 0), world, config)
    start = {"one-step": algorithms.one_step, "two-step": algorithms.two_step}[algorithm]
    stream = exact = torch.zeros(6, 160)
    for step in range(steps):
        parts = [contribution(rank, step) for rank in range(world)]
        exact = exact + sum(parts)
        stream = stream + lockstep.first(lambda link: start(parts[link.rank], link, plan, residuals[link.rank]), world)  # noqa: B023
    return stream, exact, plan


def drifted(world: int, algorithm: str, steps: int, with_residuals: bool) -> float:
    """Squared error of :func:`drift` in the mean."""
    residuals = [Residuals() if with_residuals else None for _ in range(world)]
    stream, exact, _ = drift(world, algorithm, steps, residuals)
    return (stream - exact).square().mean().item()


@pytest.mark.parametrize(("world", "algorithm"), [(2, "one-step"), (3, "two-step"), (8, "two-step")])
def test_roundings_do_not_add_up(world: int, algorithm: str) -> None:
    once = drifted(world, algorithm, 1, with_residuals=False)
    without = drifted(world, algorithm, 16, with_residuals=False)
    kept = drifted(world, algorithm, 16, with_residuals=True)
    assert without > 10 * once
    assert kept < 2 * once


def _real(rank: int, world: int, algorithm: str) -> list[Tensor]:
    """The stream after each of three all-reduces with feedback, on real ranks."""
    config = Config(bits=4, min_bytes=0, algorithm=algorithm)
    stream, residuals, streams = torch.zeros(6, 160), Residuals(), []
    for step in range(3):
        stream = stream + all_reduce(contribution(rank, step), None, config, residuals=residuals)
        streams.append(stream)
    return streams


@pytest.mark.parametrize("algorithm", ["one-step", "two-step"])
def test_simulated_ranks_are_real_ranks(algorithm: str) -> None:
    expected = [drift(3, algorithm, steps, [Residuals() for _ in range(3)])[0] for steps in (1, 2, 3)]
    for streams in spawn(_real, 3, algorithm):
        assert all(torch.equal(found, wanted) for found, wanted in zip(streams, expected, strict=True))


def lacking(codec: Rotated, residuals: Tensor, length: int) -> Tensor:
    """The values that a leg's residual of slices of ``length`` stands for."""
    slices = residuals.split(codec.residual_numel(length))
    numbers = [rotated._ungrouped(each, codec.block) / codec.block for each in slices]
    return torch.cat([rotated.butterflies(each).flatten()[:length] for each in numbers])


@pytest.mark.parametrize(("world", "algorithm"), [(2, "one-step"), (3, "two-step")])
def test_what_the_stream_lacks_is_what_the_ranks_keep(world: int, algorithm: str) -> None:
    """Of the reduce leg the residuals of all ranks, of the gather leg that of each slice's owner."""
    residuals = [Residuals() for _ in range(world)]
    stream, exact, plan = drift(world, algorithm, 8, residuals)
    length = stream.numel() if algorithm == "one-step" else algorithms.slice_length(stream.numel(), world, plan)
    legs = [each.parts[0] for each in residuals]
    missing = sum(lacking(plan.reduce, each.reduce, length)[: stream.numel()] for each in legs)
    if algorithm == "two-step":
        missing += torch.cat([lacking(plan.gather, each.gather, length) for each in legs])[: stream.numel()]
    assert missing.abs().max() > 0.1
    assert torch.allclose(stream + missing.view_as(stream), exact, atol=1e-4)


def test_a_codec_without_residuals_is_refused() -> None:
    plan = policy.plan("all_reduce", contribution(0, 0), 2, Config(bits=4, min_bytes=0, recipe="flash-v1"))
    with pytest.raises(ValueError, match="only codecs of recipe auto"):
        lockstep.first(lambda link: algorithms.two_step(contribution(0, 0), link, plan, Residuals()), 2)


def test_residuals_of_another_shape_are_refused() -> None:
    residuals = [Residuals() for _ in range(2)]
    drift(2, "one-step", 1, residuals)
    plan = policy.plan("all_reduce", torch.zeros(4096), 2, AUTO)
    with pytest.raises(ValueError, match=r"reduce leg remembers \d+ numbers, this tensor takes 4096; start with new"):
        lockstep.first(lambda link: algorithms.one_step(torch.zeros(4096), link, plan, residuals[link.rank]), 2)


def _scattered(rank: int, world: int) -> tuple[float, float]:
    """Squared error of a stream of reduce-scattered sums, without and with residuals."""
    errors = []
    for residuals in (None, Residuals()):
        stream = exact = torch.zeros(4, 160)
        for step in range(12):
            parts = [contribution(each, step, (8, 160)) for each in range(world)]
            stream = stream + reduce_scatter(parts[rank], None, AUTO, residuals=residuals)
            exact = exact + sum(parts).chunk(world)[rank]
        errors.append((stream - exact).square().mean().item())
    return errors[0], errors[1]


def test_reduce_scatter_keeps_residuals_of_the_whole_partial_sum() -> None:
    for without, kept in spawn(_scattered, 2):
        assert kept < 0.2 * without


# ---- in Megatron ------------------------------------------------------------------------------------------------


def _gpt(world: int, sequence_parallel: bool) -> nn.Module:
    """Six layers, whose row-parallel sums all land in one residual stream."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=6, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=world,
        sequence_parallel=sequence_parallel, use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return GPTModel(config, get_gpt_layer_local_spec(), 128, 64, position_embedding_type="rope").eval()


def _megatron(rank: int, world: int) -> dict[str, object]:
    """Errors of the residual stream with and without feedback, for prompts of two shapes; and what training counts."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    import flashcomm_megatron as fc
    from flashcomm_megatron import cpu

    cpu.enable(force=True)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    model_parallel_cuda_manual_seed(1)
    seen: dict[str, object] = {}
    for sequence_parallel in (False, True):
        model, streams = _gpt(world, sequence_parallel), []
        model.decoder.final_layernorm.register_forward_pre_hook(lambda _, args: streams.append(args[0].clone()))  # noqa: B023
        for shape in ((2, 64), (1, 32)):
            tokens = torch.arange(shape[0] * shape[1]).view(shape) * 7 % 128
            feedback.reset_counts()
            with torch.no_grad():
                model(tokens, tokens, None)
                with fc.flashcomm(AUTO):
                    model(tokens, tokens, None)
                    seen["counts"] = feedback.counts()
                    handed, feedback.residuals = feedback.residuals, lambda *args: None
                    model(tokens, tokens, None)
                    feedback.residuals = handed
            exact, kept, plain = streams[-3:]
            seen[f"{shape} {sequence_parallel}"] = [(each - exact).square().sum().item() for each in (kept, plain)]
    feedback.reset_counts()
    with fc.flashcomm(AUTO):
        model.train()(tokens, tokens, None)
    return seen | {"training": feedback.counts()}


@pytest.fixture(scope="module")
def megatron() -> list[dict[str, object]]:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    return spawn(_megatron, 2, seconds=200)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("shape", [(2, 64), (1, 32)])
def test_the_residual_stream_ends_nearer_the_exact_one(megatron, shape, sequence_parallel) -> None:  # type: ignore[no-untyped-def]
    for seen in megatron:
        kept, plain = seen[f"{shape} {sequence_parallel}"]
        assert kept < 0.6 * plain


def test_megatron_counts_and_reasons(megatron) -> None:  # type: ignore[no-untyped-def]
    for seen in megatron:
        assert seen["counts"] == {"on": 12}
        assert seen["training"] == {"training": 12}
