"""A script's command line without a GPU: defaults that a CPU can run, and one sentence for what it cannot.

Every parser of the process is watched where it parses. ``DEFAULTS`` changes the default of an option that the parser
has, so what the user gives still counts; ``REFUSED`` names the values that need a GPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ..megatron.patching import Seam


class Default(NamedTuple):
    """An option that a script would otherwise have to be given."""

    name: str  # as in the parsed arguments
    value: Any
    why: str


class Refusal(NamedTuple):
    """An option that cannot be had."""

    name: str
    needs_gpu: Callable[[Any], bool]
    advice: str


DEFAULTS = (
    Default("transformer_impl", "local", "Transformer Engine has no CPU kernels"),
    Default("use_cpu_initialization", True, "weights are made where they stay"),
    Default("distributed_backend", "gloo", "printed; NCCL needs GPUs"),
    Default("gradient_accumulation_fusion", False, "a CUDA kernel of apex"),
    Default("masked_softmax_fusion", False, "a CUDA kernel of Megatron"),
    Default("persist_layer_norm", False, "torch's norm has no persistent kernel"),
    Default("no_persist_layer_norm", True, "torch's norm has no persistent kernel"),
    Default("rope_fusion", False, "apply_rope_fusion needs Transformer Engine"),
    Default("apply_rope_fusion", False, "a kernel of Transformer Engine"),
    Default("inference_dynamic_batching_buffer_size_gb", 1.0, "a server's 40 GB of keys and values is a laptop's all"),
)
REFUSED = (
    Refusal("transformer_impl", lambda value: value != "local",
            "Transformer Engine's layers need a GPU: leave --transformer-impl out."),
    Refusal("fp8", bool, "FP8 needs a GPU: leave --fp8-format out."),
    Refusal("fp4", bool, "FP4 needs a GPU: leave --fp4-format out."),
    Refusal("enable_cuda_graph", bool, "CUDA graphs need a GPU: leave --enable-cuda-graph out."),
    Refusal("cuda_graph_impl", lambda value: value not in (None, "none"),
            "CUDA graphs need a GPU: leave --cuda-graph-impl out."),
    Refusal("use_persistent_ckpt_worker", bool,
            "The process that saves checkpoints would need a GPU: leave --use-persistent-ckpt-worker out."),
)  # fmt: skip
# Variables that Megatron insists on for the sake of a GPU's order of work.
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
_were_unset: list[str] = []


def enter() -> None:
    """Set the variables that are not set. Idempotent."""
    unset = [name for name in ENVIRONMENT if name not in os.environ]
    os.environ.update({name: ENVIRONMENT[name] for name in unset})
    _were_unset.extend(unset)


def leave() -> None:
    """Unset those again. Idempotent."""
    while _were_unset:
        os.environ.pop(_were_unset.pop(), None)


def _parse(original: Callable[..., Any]) -> Callable[..., Any]:
    def parse_known_args(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        known = {action.dest for action in self._actions}
        self.set_defaults(**{row.name: row.value for row in DEFAULTS if row.name in known})
        namespace, rest = original(self, *args, **options)
        for row in REFUSED:
            if row.needs_gpu(getattr(namespace, row.name, None)) and row.name in known:
                self.exit(2, f"{self.prog}: error: {row.advice}\n")
        return namespace, rest

    return parse_known_args


SEAMS = (
    Seam("argparse", "ArgumentParser.parse_known_args", ("self",), _parse,
         "every parse_args ends here, whatever the script's parser is made of"),
)  # fmt: skip
