"""GPT models whose sums reach the residual stream unchanged, or do not: what residual feedback must tell apart.

Each structure is Megatron's local layer with something between a row-parallel layer's sum and the residual stream.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

LAYERS, HIDDEN, VOCABULARY, TOKENS = 6, 64, 128, 64


class Changed(RowParallelLinear):
    """A row-parallel layer whose sum is changed before anybody adds it."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """The changed sum, and no bias."""
        output, bias = super().forward(*args, **options)
        return self.changed(output if bias is None else output + bias), None

    def changed(self, x: Tensor) -> Tensor:
        """What the residual stream gets."""
        raise NotImplementedError


class Normed(Changed):
    """Gemma 2 and 3, EXAONE 4, GLM 4: a norm behind the sum."""

    def changed(self, x: Tensor) -> Tensor:
        """Root mean square 0.05."""
        return 0.05 * x / x.square().mean(-1, keepdim=True).sqrt()


class Quarter(Changed):
    """Falcon-H1: a multiplier of its own for each kind of branch."""

    def changed(self, x: Tensor) -> Tensor:
        """A quarter."""
        return 0.25 * x


class Scaled(Changed):
    """InternViT: a factor for each channel (LayerScale)."""

    def changed(self, x: Tensor) -> Tensor:
        """Around a tenth."""
        return torch.linspace(0.05, 0.15, x.size(-1)) * x


class Gated(Changed):
    """WAN: a factor for each token."""

    def changed(self, x: Tensor) -> Tensor:
        """Around one."""
        return x * (1 + torch.sin(torch.arange(x.size(0)))).view(-1, 1, 1)


class Adapted(RowParallelLinear):
    """LoRA: a second way through a small row-parallel layer."""

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        small = options | {"bias": False, "skip_bias_add": True}
        self.adapter_in = RowParallelLinear(input_size, 32, **small)
        self.adapter_out = torch.nn.Linear(32, output_size, bias=False)
        torch.nn.init.normal_(self.adapter_out.weight, std=0.3, generator=torch.Generator().manual_seed(3))

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """The sum and what the adapter adds."""
        output, bias = super().forward(x, *args, **options)
        return output + self.adapter_out(self.adapter_in(x)[0]), bias


# name: (class of attention's projection, class of the feed-forward's, factor of the feed-forward's weights)
STRUCTURES: dict[str, tuple[type, type, float]] = {
    "pre-norm": (RowParallelLinear, RowParallelLinear, 1.0),
    "norm behind the sums": (Normed, Normed, 1.0),
    "norm behind the sums, one branch x 8": (Normed, Normed, 8.0),
    "norms behind the sums only": (Normed, Normed, 1.0),
    "multiplier": (Quarter, RowParallelLinear, 1.0),
    "LayerScale": (Scaled, Scaled, 1.0),
    "gate": (RowParallelLinear, Gated, 1.0),
    "LoRA": (Adapted, RowParallelLinear, 1.0),
}


def _parts(spec: Any) -> Any:
    """Submodules of a specification; from 0.18 on some are partial calls of a class."""
    return spec.submodules if hasattr(spec, "submodules") else spec.keywords["submodules"]


def build(name: str, world: int, sequence_parallel: bool = False, hidden: int = HIDDEN, **options: Any) -> Any:
    """A model of six layers with one of the structures, in evaluation mode."""
    proj, fc2, factor = STRUCTURES[name]
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=hidden, num_attention_heads=4, tensor_model_parallel_size=world,
        sequence_parallel=sequence_parallel, use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
        init_method_std=0.1, **options,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec()
    layer = spec.submodules
    _parts(layer.self_attention).linear_proj = proj
    _parts(layer.mlp).linear_fc2 = fc2
    if name == "norms behind the sums only":
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    more: dict[str, Any] = {}
    if options.get("mtp_num_layers"):
        more["mtp_block_spec"] = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    model = GPTModel(config, spec, VOCABULARY, TOKENS, position_embedding_type="learned_absolute", **more)
    with torch.no_grad():
        for each in model.decoder.layers:
            each.mlp.linear_fc2.weight.mul_(factor)
    return model.eval()
