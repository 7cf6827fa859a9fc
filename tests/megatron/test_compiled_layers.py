"""torch.compile of patched layers: it works wherever it works without us, with the same numbers.

A graph break at a seam is fine, an exception is not. Lengths on both sides of the minimum size, so that compiled code
meets deferred and compressed calls.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from ranks import spawn, tensor_parallel
from torch import Tensor, nn

import flashcomm_megatron as fc
from flashcomm_megatron import cpu

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

HIDDEN, LENGTHS, LEAST = 64, (4, 32, 48, 8), 2000  # 8 * 64 * 4 bytes are compressed, 4 * 64 * 4 are not

# Sequence parallelism and training; inductor calls a C++ compiler, so it takes two of the four.
CASES = {"aot_eager": [(False, False), (False, True), (True, False), (True, True)],
         "inductor": [(False, False), (True, True)]}  # fmt: skip


def feed_forward(sequence_parallel: bool, world: int) -> nn.Module:
    """A column-parallel and a row-parallel layer of Megatron-Core."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=world,
        sequence_parallel=sequence_parallel, use_cpu_initialization=True,
    )  # fmt: skip
    how: dict[str, Any] = {"config": config, "init_method": nn.init.xavier_uniform_, "bias": False}

    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = ColumnParallelLinear(HIDDEN, 2 * HIDDEN, gather_output=False, **how)
            self.down = RowParallelLinear(2 * HIDDEN, HIDDEN, input_is_parallel=True, skip_bias_add=True, **how)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)[0]))[0] * 2

    return FeedForward()


def outputs(layer: Any, train: bool, rank: int) -> list[Tensor]:
    """Results, and in training the input's gradients, for every length."""
    found = []
    for length in LENGTHS:
        x = torch.randn(length, 1, HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_(train)
        with torch.set_grad_enabled(train):
            y = layer(x)
        found.append(y.detach())
        if train:
            y.square().sum().backward()
            found.append(x.grad)
    return found


def compare(rank: int, world: int, backend: str) -> None:
    tensor_parallel(world)
    for sequence_parallel, train in CASES[backend]:
        seed = rank if sequence_parallel else 0  # without sequence parallelism ranks hold the same input
        layer = feed_forward(sequence_parallel, world).train(train)
        torch._dynamo.reset()
        with fc.flashcomm(bits=8, min_bytes=LEAST):
            compiled = outputs(torch.compile(layer, backend=backend), train, seed)  # its first forward included
            fc.reset_stats()
            eager = outputs(layer, train, seed)
            counted = fc.stats()
        assert counted["quantized"] and counted["deferred"]
        for a, b in zip(compiled, eager, strict=True):
            assert torch.equal(a, b) if backend == "aot_eager" else torch.allclose(a, b, atol=1e-2, rtol=0.02)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_layer_gives_the_bits_of_the_layer(backend: str) -> None:
    spawn(compare, 2, backend, seconds=200)


def whole_model(rank: int, world: int, backend: str) -> None:
    tensor_parallel(world)
    for sequence_parallel, train in CASES[backend]:
        model = mixtures.gpt(sequence_parallel=sequence_parallel).train(train)
        torch._dynamo.reset()
        with fc.flashcomm(bits=8, min_bytes=LEAST):
            compiled = losses(torch.compile(model, backend=backend), train)  # its first forward included
            fc.reset_stats()
            eager = losses(model, train)
            counted = fc.stats()
        assert counted["quantized"] and any(reason.startswith("below") for reason in counted["deferred"])
        for a, b in zip(compiled, eager, strict=True):
            assert torch.allclose(a, b, rtol=0.02, atol=1e-3)


def losses(model: Any, train: bool) -> list[Tensor]:
    """The loss, and in training the first layer's gradient, for every length."""
    found = []
    for length in (16, 4, 16, 8):
        ids = torch.arange(length).view(1, -1)
        model.zero_grad()
        with torch.set_grad_enabled(train):
            loss = model(ids, ids, None, labels=ids)
        found.append(loss.detach().clone())
        if train:
            loss.mean().backward()
            found.append(model.decoder.layers[0].mlp.linear_fc1.weight.grad.clone())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_gives_the_losses_and_gradients_of_the_model(backend: str) -> None:
    spawn(whole_model, 2, backend, seconds=400)


def engine(rank: int, world: int) -> dict[str, Any]:
    """A column-parallel layer of Transformer Engine, by itself and compiled: results and compressed collectives."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "stand_ins" / "transformer_engine"))
    cpu.enable(force=True)
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=world,
        sequence_parallel=True, use_cpu_initialization=True,
    )  # fmt: skip
    layer = TEColumnParallelLinear(
        HIDDEN, 2 * HIDDEN, config=config, init_method=nn.init.xavier_uniform_, gather_output=False, bias=False,
        skip_bias_add=False, is_expert=False,
    )  # fmt: skip
    found = {}
    with fc.flashcomm(bits=4, min_bytes=0):
        for name, run in {"eager": layer, "compiled": torch.compile(layer, backend="eager")}.items():
            fc.reset_stats()
            x = torch.randn(8, 1, HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()
            layer.zero_grad()
            run(x)[0].square().sum().backward()
            found[name] = [x.grad, layer.weight.grad], fc.stats()["quantized"]
    return found


def test_compiled_code_runs_transformer_engines_layers_as_they_are() -> None:
    """From 2.20 on they have an operator for compiled code; its backward would not know the site."""
    for rank in spawn(engine, 2, seconds=200):
        (eager, calls), (compiled, calls_compiled) = rank["eager"], rank["compiled"]
        assert calls == calls_compiled == 3  # the input twice, and its gradient
        assert all(map(torch.equal, eager, compiled))
