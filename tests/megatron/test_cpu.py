"""CPU mode: models build, train and recompute over gloo, TP2 equals TP1, and every original comes back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import spawn

from flashcomm_megatron import cpu
from flashcomm_megatron.megatron import patching

LAYERS, VOCAB, CONTEXT, BATCH, STEPS = 2, 64, 16, 2, 3
# Both sides sum some hundred float32 products, in different orders, in each of a few layers and steps.
ROUNDING = 32 * torch.finfo(torch.float32).eps


def bound(seam: patching.Seam) -> Any:
    """The object that a row's name is bound to, staticmethod wrapper included."""
    return patching.find(seam)[2]


@pytest.fixture
def restored() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = [bound(seam) for seam in cpu.SEAMS]
    yield before
    cpu.disable()


def test_enable_replaces_every_row_and_disable_restores_the_objects(restored: list[Any]) -> None:
    cpu.disable()
    assert cpu.enable(force=True)
    replaced = [bound(seam) for seam in cpu.SEAMS]
    assert not any(now is then for now, then in zip(replaced, restored, strict=True))
    assert cpu.enable(force=True)
    assert all(bound(seam) is now for seam, now in zip(cpu.SEAMS, replaced, strict=True))
    cpu.disable()
    assert all(bound(seam) is then for seam, then in zip(cpu.SEAMS, restored, strict=True))


def test_a_gpu_is_left_alone_unless_forced(restored: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not cpu.enable()
    assert all(bound(seam) is then for seam, then in zip(cpu.SEAMS, restored, strict=True))
    assert cpu.enable(force=True)
    assert torch.cuda.current_device() == torch.device("cpu")


def test_rows_say_why() -> None:
    assert all(len(seam.why) > 30 for seam in cpu.SEAMS)
    assert len({seam.path for seam in cpu.SEAMS}) == len(cpu.SEAMS)


# ---- models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Any]]:
    """What each of two ranks found: {case: (losses, weights by name with their split dimension)}, and its streams."""
    return spawn(train_all, 2)


CASES = {
    "tp1": dict(tp=1),
    "tp2": dict(tp=2),
    "tp2 sp": dict(tp=2, sp=True),
    "tp1 rms": dict(tp=1, norm="RMSNorm"),
    "tp2 sp rms": dict(tp=2, sp=True, norm="RMSNorm"),
    "dropout": dict(tp=2, dropout=0.3),
    "dropout recomputed": dict(tp=2, dropout=0.3, recompute=True),
    "dropout sp": dict(tp=2, sp=True, dropout=0.3),
}


def train_all(rank: int, world: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    assert cpu.enable()
    return {name: train(**case) for name, case in CASES.items()} | {"streams": draw(world)}


def train(
    tp: int, sp: bool = False, norm: str = "LayerNorm", dropout: float = 0.0, recompute: bool = False
) -> tuple[list[float], dict[str, Any]]:
    """Losses of a few SGD steps of a small GPT on fixed tokens, and the weights after them."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    model = build(tp, sp, norm, dropout, recompute)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(VOCAB, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    positions = torch.arange(CONTEXT).expand_as(inputs)
    losses = []
    for _ in range(STEPS):
        loss = model(inputs, positions, None, labels=labels).mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        optimizer.step()
        losses.append(loss.item())
    weights = {name: (p.detach(), getattr(p, "partition_dim", -1)) for name, p in model.named_parameters()}
    parallel_state.destroy_model_parallel()
    return losses, weights


def build(tp: int, sp: bool, norm: str, dropout: float, recompute: bool) -> Any:
    """A GPT whose initial weights do not depend on how many ranks share them."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    recomputed = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        normalization=norm,
        attention_dropout=dropout,
        hidden_dropout=dropout,
        tensor_model_parallel_size=tp,
        sequence_parallel=sp,
        use_cpu_initialization=True,
        **(recomputed if recompute else {}),
    )
    spec = cpu.layer_spec(config)
    return GPTModel(config, spec, VOCAB, CONTEXT, position_embedding_type="rope").train()


def whole(ranks: list[dict[str, Any]], case: str) -> dict[str, torch.Tensor]:
    """The weights of a TP2 case put together."""
    (_, first), (_, second) = (rank[case] for rank in ranks)
    return {
        name: weight if split < 0 else torch.cat([weight, second[name][0]], split)
        for name, (weight, split) in first.items()
    }


@pytest.mark.parametrize(("one", "two"), [("tp1", "tp2"), ("tp1", "tp2 sp"), ("tp1 rms", "tp2 sp rms")])
def test_two_ranks_train_like_one(trained: list[dict[str, Any]], one: str, two: str) -> None:
    losses, weights = trained[0][one]
    assert losses[-1] < losses[0] - 0.1
    assert trained[0][two][0] == pytest.approx(losses, rel=ROUNDING)
    found = whole(trained, two)
    for name, (expected, _) in weights.items():
        error = (found[name] - expected).norm() / expected.norm().clamp(min=1e-3)
        assert error < ROUNDING, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("case", ["tp2", "tp2 sp", "tp2 sp rms", "dropout", "dropout sp"])
def test_what_ranks_do_not_share_stays_equal(trained: list[dict[str, Any]], case: str) -> None:
    second = trained[1][case][1]
    shared = [name for name, (_, split) in second.items() if split < 0]
    assert any("layernorm" in name for name in shared)
    for name in shared:
        assert torch.equal(trained[0][case][1][name][0], second[name][0]), name


def test_recomputation_draws_the_same_dropout(trained: list[dict[str, Any]]) -> None:
    """Recomputed activations give the very gradients of kept ones, so losses stay the same bits."""
    assert trained[0]["dropout recomputed"][0] == trained[0]["dropout"][0]
    assert trained[0]["dropout"][0] != trained[0]["tp2"][0]


def test_each_rank_draws_from_its_own_random_stream_and_a_common_one(trained: list[dict[str, Any]]) -> None:
    """Each rank has a stream of its own beside the common one, and neither moves the other."""
    (own, common), (other, common_too) = (rank["streams"] for rank in trained)
    assert torch.equal(common, common_too)
    assert not torch.equal(own, other)
    assert len({tuple(part.tolist()) for part in own.chunk(2)}) == 2, "the stream did not advance between two forks"


def draw(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two draws from the rank's own stream, and three from the common one around them."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    own, common = [], [torch.rand(3)]
    for _ in range(2):
        with tracker.fork():
            own.append(torch.rand(3))
        common.append(torch.rand(3))
    with pytest.raises(RuntimeError, match="nowhere"), tracker.fork("nowhere"):
        pass
    return torch.cat(own), torch.cat(common)
