"""CPU mode: Megatron on a machine with no GPU, from a model of Megatron-Core to a whole unmodified script.

``enable()`` lets Megatron-Core build, train and run models over gloo: it answers a few questions for the CPU (core.py,
triton.py) and touches nothing else. ``enable(scripts=True)``, which is ``python -m flashcomm_megatron --cpu SCRIPT``,
grows what Megatron-LM's scripts ask beyond that:

- cuda.py: torch.cuda's devices, streams, events, memory statistics, random states and tensor types;
- literals.py: the device "cuda" in the script's own calls;
- backends.py: NCCL, torch.compile and what Megatron-LM compiles when it starts;
- options.py: defaults of the command line, and sentences for what cannot work.

Each is a table, one row for each replaced name with the reason; patching.py applies and reverts it. Where there is a
GPU ``enable()`` does nothing unless forced; ``disable()`` puts every original back.
"""

from __future__ import annotations

from typing import Any

import torch

from ..megatron import patching
from . import backends, core, cuda, literals, options, triton
from .cuda import NeedsGPU

__all__ = ["SCRIPT_SEAMS", "SEAMS", "NeedsGPU", "disable", "enable", "layer_spec"]

SEAMS = core.SEAMS
SCRIPT_SEAMS = (*cuda.SEAMS, *literals.SEAMS, *backends.SEAMS, *options.SEAMS)


def enable(force: bool = False, scripts: bool = False) -> bool:
    """Make Megatron-Core run on the CPU if there is no GPU, or in any case with ``force``; returns whether it did.

    With ``scripts`` also what whole scripts need, which is for the process of such a script: torch.cuda then claims to
    be there. Idempotent. Raises PatchError, and changes nothing, if the installed Megatron-Core does not fit the table.
    """
    wanted = force or is_on() or not torch.cuda.is_available()
    if wanted and scripts:
        patching.apply(SCRIPT_SEAMS)  # before Megatron-Core is imported, which binds torch.compile
        literals.enter()
        options.enter()
    if wanted:
        triton.enter()
        try:
            patching.apply([*SEAMS, *(backends.present() if scripts else ())])
        except patching.PatchError:
            disable()
            raise
        if scripts:
            backends.enter()
    return wanted


def is_on() -> bool:
    """Whether CPU mode is in force; torch.cuda.is_available() then tells nothing."""
    return all(state == "patched" for _, state in patching.status(SEAMS[:1]))


def disable() -> None:
    """Restore every original object. Idempotent."""
    patching.revert([*backends.MEGATRON, *SEAMS, *reversed(SCRIPT_SEAMS)])
    backends.leave()
    triton.leave()
    literals.leave()
    options.leave()


def layer_spec(config: Any) -> Any:
    """The decoder's layers for a TransformerConfig, as GPTModel's ``transformer_layer_spec``.

    Names only Megatron-Core's own modules and torch's norms, also where apex or Transformer Engine is installed.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), layer_norm=WrappedTorchNorm)
