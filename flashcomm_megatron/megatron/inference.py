"""Megatron's inference-optimized layers (``--transformer-impl inference_optimized``), which do not call their parents.

They multiply and communicate by themselves outside of training: with kernels over NVLink SHARP (NVLS) where the
tensors fit in symmetric memory, and else through Transformer Engine's functions, bound in ``inference_layers.py``.
The latter are compressed as in transformer_engine.py. What the NVLS kernels move is left to them and counted as "NVLS
kernel"; ``--inference-disable-triton-nvls-kernels`` (0.17 on) sends it past us instead.
"""

from __future__ import annotations

from .patching import Seam
from .transformer_engine import gather, layer_forward, reduce_scatter

LAYERS = "megatron.core.tensor_parallel.inference_layers"
OLDEST = (0, 16)

ROWS = (
    Seam(LAYERS, "InferenceRowParallelLinear.forward", ("self", "x"), layer_forward,
         "notes the row site outside of training; in training the parent's forward does",
         is_layer=True),
    Seam(LAYERS, "InferenceLayerNormColumnParallelLinear.forward", ("self", "x"), layer_forward,
         "notes the column site outside of training",
         is_layer=True),
    Seam(LAYERS, "reduce_scatter_along_first_dim", ("inp", "tp_group", "async_op"), reduce_scatter,
         "row reduce-scatter where no NVLS kernel runs; inference_layers.py's own binding"),
    Seam(LAYERS, "gather_along_first_dim", ("inp", "process_group", "async_op", "quantizer"), gather,
         "column all-gather where no NVLS kernel runs; inference_layers.py's own binding"),
)  # fmt: skip
SINCE_0_17 = (
    Seam(LAYERS, "InferenceColumnParallelLinear.forward", ("self", "x"), layer_forward,
         "notes the column site of latent attention and multi-token prediction outside of training",
         is_layer=True),
)  # fmt: skip


def rows(version: tuple[int, ...]) -> tuple[Seam, ...]:
    """What Megatron-Core of this version has of the table."""
    if version < OLDEST:
        return ()
    return ROWS + (SINCE_0_17 if version >= (0, 17) else ())
