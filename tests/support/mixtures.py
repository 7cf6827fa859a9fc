"""Models of many kinds, as small as they get, and a recorder of what each of them sends compressed.

Each builder returns a model of two layers (hidden 64) and its inputs; parallel groups are the caller's. Router,
dispatcher, latent attention, predictor and pipeline stages are Megatron-Core's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flashcomm_megatron as fc
from flashcomm_megatron.megatron import context as where
from flashcomm_megatron.megatron import differentiable, gradients

TOKENS, VOCABULARY, HIDDEN = 16, 128, 64
BASE = {
    "num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 4, "ffn_hidden_size": 96,
    "use_cpu_initialization": True, "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "tensor_model_parallel_size": 2, "sequence_parallel": True,
}  # fmt: skip
EXPERTS = {
    "num_moe_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01, "moe_ffn_hidden_size": 32,
    "moe_layer_freq": [0, 1],
}  # fmt: skip
ATTENTION, DENSE = ("self_attention.linear_qkv", "self_attention.linear_proj"), ("mlp.linear_fc1", "mlp.linear_fc2")


def gpt(**options: Any) -> Any:
    """A GPT model with Megatron's local layers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # some versions name it without Transformer Engine
    attention = options.pop("attention", None)
    stage = {name: options.pop(name) for name in ("pre_process", "post_process") if name in options}
    config = TransformerConfig(**BASE | options)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in spec.layer_specs if attention else ():
        layer.submodules.self_attention.submodules.core_attention = attention
    return GPTModel(config, spec, VOCABULARY, TOKENS, position_embedding_type="rope", **stage)


class Attention(torch.nn.Module):
    """Causal attention, for what Megatron leaves to Transformer Engine: latent dimensions and context parallelism.

    Under context parallelism keys and values are gathered by Megatron's own collective.
    """

    def __init__(self, config: Any, layer_number: int, *args: Any, **options: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        """[tokens, batch, heads, dim] each to [tokens, batch, heads * dim]."""
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        group = parallel_state.get_context_parallel_group()
        if group.size() > 1:
            k, v = (gather_from_sequence_parallel_region(each, group=group) for each in (k, v))
        rows, columns = q.size(0), k.size(0)
        hidden = torch.ones(columns, columns, dtype=torch.bool).triu(1)[rows * group.rank() :][:rows]
        scores = torch.einsum("qbhd,kbhd->bhqk", q, k).masked_fill(hidden, float("-inf"))
        return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), v).flatten(2)


def transformer_engine(sequence_parallel: bool) -> Any:
    """A GPT model of Megatron's Transformer Engine layers; attention's core and lone norms are those of torch."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**BASE | {"sequence_parallel": sequence_parallel})
    layer = get_gpt_layer_with_transformer_engine_spec()
    layer.submodules.self_attention.submodules.core_attention = Attention
    spec = TransformerBlockSubmodules([layer] * config.num_layers, layer_norm=WrappedTorchNorm)
    return GPTModel(config, spec, VOCABULARY, TOKENS, position_embedding_type="rope").train(sequence_parallel)


def latent_attention() -> Any:
    """Multi-latent attention: queries, keys and values come up from small latents. Needs Transformer Engine."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(
        **BASE, multi_latent_attention=True, q_lora_rank=24, kv_lora_rank=16, qk_head_dim=16, qk_pos_emb_head_dim=8,
        v_head_dim=16, rope_type="rope",
    )  # fmt: skip
    layer = get_gpt_layer_with_transformer_engine_spec(multi_latent_attention=True)
    layer.submodules.self_attention.submodules.core_attention = Attention
    layer.submodules.input_layernorm = WrappedTorchNorm
    spec = TransformerBlockSubmodules([layer] * config.num_layers, layer_norm=WrappedTorchNorm)
    return GPTModel(config, spec, VOCABULARY, TOKENS, position_embedding_type="rope")


def mamba() -> Any:
    """A hybrid of a Mamba layer and a feed-forward layer. Needs Transformer Engine and mamba_ssm."""
    from megatron.core.models.mamba import MambaModel
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**BASE, mamba_num_heads=4, mamba_head_dim=32, mamba_state_dim=8, mamba_num_groups=2)
    return MambaModel(config, mamba_stack_spec, VOCABULARY, TOKENS, hybrid_override_pattern="M-")


def token_prediction() -> Any:
    """A GPT model that predicts one token more, by a layer of its own."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**BASE, mtp_num_layers=1)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    predictor = get_gpt_mtp_block_spec(config, spec.layer_specs[-1], use_transformer_engine=False)
    return GPTModel(config, spec, VOCABULARY, TOKENS, position_embedding_type="rope", mtp_block_spec=predictor)


class Recorder:
    """What was compressed in forward and in backward, (collective, layer), and every module's inputs and outputs."""

    def __init__(self, model: Any) -> None:
        named = {module: name.removeprefix("decoder.layers.") for name, module in model.named_modules()}
        # Megatron 0.19 calls the predictor's layer otherwise.
        self.names = {each: name.replace("mtp_model_layer", "transformer_layer") for each, name in named.items()}
        self.forward: list[tuple[str, str]] = []
        self.backward: list[tuple[str, str]] = []
        self.dtypes: set[torch.dtype] = set()
        self.io: dict[str, tuple[Any, Any, Any]] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._keep, name), with_kwargs=True)

    def _keep(self, name: str, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.io[name] = copies(args), {key: copies(value) for key, value in kwargs.items()}, copies(output)

    def planned(self, asked: Callable[..., Any], kind: str, collective: str, x: Tensor, *more: Any) -> Any:
        """The answer to whether an activation is compressed, noted."""
        answer, site = asked(kind, collective, x, *more), where.site()
        return self._note(self.forward, answer, collective, x, site)

    def planned_gradient(self, asked: Callable[..., Any], collective: str, x: Tensor, group: Any, site: Any) -> Any:
        """The answer to whether a gradient is compressed, noted."""
        return self._note(self.backward, asked(collective, x, group, site), collective, x, site)

    def _note(self, calls: list[tuple[str, str]], answer: Any, collective: str, x: Tensor, site: Any) -> Any:
        if answer is not None:
            calls.append((collective, self.names[site.module]))
            self.dtypes.add(x.dtype)
        return answer


def copies(values: Any) -> Any:
    """Tensors copied, because losses and activations work in place."""
    if isinstance(values, Tensor):
        return values.detach().clone()
    return tuple(map(copies, values)) if isinstance(values, tuple | list) else values


@contextmanager
def recorded(recorder: Recorder, config: fc.Config) -> Iterator[None]:
    """Compress inside the block, and note it."""
    asked = differentiable.planned, gradients.planned
    differentiable.planned = partial(recorder.planned, asked[0])
    gradients.planned = partial(recorder.planned_gradient, asked[1])
    try:
        with fc.flashcomm(config):
            yield
    finally:
        differentiable.planned, gradients.planned = asked


def step(model: Any, ids: Tensor, config: fc.Config, exact: Sequence[str], training: bool = True) -> dict[str, Any]:
    """A forward, in training with its backward: what was compressed, and whether the modules ``exact`` were."""
    recorder = Recorder(model)
    with recorded(recorder, config):
        loss = model(ids, ids, None, labels=ids)
        recorder.forward, forward = [], recorder.forward
        if training:
            loss.mean().backward()
    found = {"forward": forward, "again": recorder.forward, "gradients": recorder.backward, "dtypes": recorder.dtypes}
    io = dict(recorder.io)  # running a module again is recorded as well
    found["exact"] = {name: same(model.get_submodule(name), *io[name]) for name in exact}
    return found | {"finite": bool(loss.isfinite().all())}


def same(module: Any, args: Any, kwargs: Any, expected: Any) -> bool:
    """Whether ``module`` returns the same bits again."""
    with torch.no_grad():
        found = module(*args, **kwargs)
    return all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


def tensors(values: Any) -> list[Tensor]:
    if isinstance(values, tuple | list):
        return [each for value in values for each in tensors(value)]
    return [values] if isinstance(values, Tensor) else []


def calls(sites: list[tuple[str, str, str | None]], column: str | None, row: str | None) -> list[tuple[str, str]]:
    """The collectives of these layers: ``column`` in the column layers, ``row`` in the row layers."""
    return [
        (collective, layer + name)
        for layer, *names in sites
        for collective, name in zip((column, row), names, strict=True)
        if name is not None and collective is not None
    ]
