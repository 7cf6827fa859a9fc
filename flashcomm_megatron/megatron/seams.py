"""THE table: every name of Megatron and Transformer Engine that we replace, and why that name reaches its callers.

A row says where the name stands, which leading parameters its replacement relies on, what takes its place, and why.
What takes its place stands in layers.py, gradients.py, experts.py, transformer_engine.py, feedback.py and counted.py.

    ALWAYS               Megatron-Core's linear layers, their collectives and gradients, residual streams
    SHARED_EXPERTS       shared experts that communicate by themselves
    TOKENS               the all-to-all of experts' tokens, when it is asked for
    TRANSFORMER_ENGINE   where that is installed; with it the rows of inference_layers.py
    COUNTED              collectives that stay exact and are counted; they wait for their module
"""

from __future__ import annotations

from packaging.version import Version

from . import context, counted, experts, feedback, gradients, layers, transformer_engine
from .patching import Seam

LAYERS = "megatron.core.tensor_parallel.layers"
LINEAR, FROZEN = "LinearWithGradAccumulationAndAsyncCommunication", "LinearWithFrozenWeight"
TRANSFORMER = "megatron.core.transformer"
DISPATCHER = f"{TRANSFORMER}.moe.token_dispatcher"
SHARED = f"{TRANSFORMER}.moe.shared_experts"
EXTENSION = "megatron.core.extensions.transformer_engine"
TE = "transformer_engine.pytorch.module"
INFERENCE = "megatron.core.tensor_parallel.inference_layers"

INPUT, GATHERED = ("input_", "group"), ("input_", "tensor_parallel_output_grad", "group")
REDUCE, GATHER = ("inp", "tp_group", "async_op"), ("inp", "process_group", "async_op", "quantizer")

ALWAYS = (
    Seam(LAYERS, "RowParallelLinear.forward", ("self", "input_"), layers.row_forward,
         "notes the row site; a method, so subclasses and instances made earlier find it at call time",
         is_layer=True),
    Seam(LAYERS, "ColumnParallelLinear.forward", ("self", "input_", "weight"), layers.column_forward,
         "notes the column site, and none for the output layer",
         is_layer=True),
    Seam(LAYERS, "reduce_from_tensor_model_parallel_region", INPUT, layers.all_reduce,
         "row all-reduce; layers.py's own binding, so routers and token counts, which hold others, are not reached"),
    Seam(LAYERS, "reduce_scatter_to_sequence_parallel_region", INPUT, layers.reduce_scatter,
         "row reduce-scatter under sequence parallelism; layers.py's own binding"),
    Seam(LAYERS, "gather_from_sequence_parallel_region", GATHERED, layers.gather,
         "column all-gather under sequence parallelism when the weight is frozen; layers.py's own binding"),
    Seam(LAYERS, "dist_all_gather_func", ("output_tensor", "input_tensor", "group", "async_op"), layers.gather_tensor,
         "column all-gather under sequence parallelism, forward and again for the weight gradient"),
    Seam(LAYERS, f"{LINEAR}.forward", ("ctx", "input", "weight"), context.keep_site,
         "keeps the site for backward; apply() looks forward up on the class at every call"),
    Seam(LAYERS, f"{LINEAR}.backward", ("ctx", "grad_output"), gradients.linear_backward,
         "restores the site, for the second gather of the input and for the gradient; looked up on the class as well"),
    Seam(LAYERS, f"{FROZEN}.forward", ("ctx", "input", "weight"), context.keep_site,
         "keeps the site for backward where the weight is frozen"),
    Seam(LAYERS, f"{FROZEN}.backward", ("ctx", "grad_output"), gradients.linear_backward,
         "all-reduce of the input's gradient where the weight is frozen"),
    Seam(LAYERS, "dist_reduce_scatter_func", ("output", "input"), gradients.reduce_scatter_tensor,
         "reduce-scatter of the input's gradient under sequence parallelism; layers.py's own binding"),
    Seam(f"{TRANSFORMER}.transformer_layer", "TransformerLayer.forward", ("self",), feedback.layer_forward,
         "residual feedback follows the residual stream from layer to layer; subclasses call it or have none",
         is_layer=True),
    Seam("megatron.core.ssm.mamba_layer", "MambaLayer.forward", ("self", "hidden_states"), feedback.layer_forward,
         "the same for Mamba layers",
         is_layer=True),
    Seam(f"{TRANSFORMER}.moe.moe_layer", "MoELayer.forward", ("self", "hidden_states"), feedback.mixture_forward,
         "a mixture is one contribution to the residual stream, whatever runs inside",
         is_layer=True),
    Seam("megatron.core.utils", "_kernel_make_viewless_tensor", ("inp", "requires_grad"), lambda original: original,
         "not compiled: torch 2.14's inductor fails on it in a graph of its own, which a break at a layer gives it"),
)  # fmt: skip

SHARED_EXPERTS = (
    Seam(SHARED, "SharedExpertMLP.pre_forward_comm", ("self", "input"), experts.shared_method,
         "gathers the input where shared experts overlap with the dispatcher, which calls it as a method"),
    Seam(SHARED, "SharedExpertMLP.post_forward_comm", ("self",), experts.shared_method,
         "sums the output where shared experts overlap with the dispatcher, which calls it as a method"),
    Seam(SHARED, "gather_from_sequence_parallel_region", GATHERED[:2], experts.shared_gather,
         "gather of the shared experts' input; shared_experts.py's own binding"),
    Seam(SHARED, "reduce_scatter_to_sequence_parallel_region", INPUT, experts.shared_reduce_scatter,
         "sum of the shared experts under sequence parallelism; shared_experts.py's own binding"),
    Seam(SHARED, "reduce_from_tensor_model_parallel_region", INPUT, experts.shared_all_reduce,
         "sum of the shared experts; shared_experts.py's own binding"),
)  # fmt: skip
FUSED_SHARED_EXPERTS = (
    Seam(SHARED, "FusedSharedExpertMLP._fused_grouped_swiglu_forward", ("self", "hidden_states"),
         experts.shared_method,
         "gathers and sums around the fused shared experts, by the three names above"),
)  # fmt: skip

TOKENS = (
    Seam(DISPATCHER, "all_to_all", ("group", "input_", "output_split_sizes_", "input_split_sizes"), experts.tokens,
         "tokens to and from their experts; the dispatcher's own binding, looked up at every call"),
    Seam(DISPATCHER, "MoEAlltoAllTokenDispatcher.token_dispatch", ("self",), experts.dispatcher_method,
         "notes the model's configuration, which all_to_all is not handed"),
    Seam(DISPATCHER, "MoEAlltoAllTokenDispatcher.token_combine", ("self",), experts.dispatcher_method,
         "the same on the way back"),
)  # fmt: skip

# Not compiled by torch.compile: from 2.20 on compiled code runs an operator, whose backward would not know the site.
TRANSFORMER_ENGINE = (
    Seam(EXTENSION, "TELinear.forward", ("self", "x"), transformer_engine.layer_forward,
         "notes the site of TERowParallelLinear and TEColumnParallelLinear, which inherit this forward"),
    Seam(EXTENSION, "TELayerNormColumnParallelLinear.forward", ("self", "x"), transformer_engine.layer_forward,
         "notes the column site; a method, so subclasses and instances made earlier find it at call time"),
    Seam(f"{TE}.linear", "_Linear.forward", ("ctx",), context.keep_site,
         "keeps the site for backward; apply() looks forward up on the class at every call"),
    Seam(f"{TE}.linear", "_Linear.backward", ("ctx",), context.restore_site,
         "restores the site, so the second gather of the input equals the first; looked up on the class as well"),
    Seam(f"{TE}.layernorm_linear", "_LayerNormLinear.forward", ("ctx",), context.keep_site,
         "keeps the site for backward, for a norm and its linear layer in one"),
    Seam(f"{TE}.layernorm_linear", "_LayerNormLinear.backward", ("ctx",), context.restore_site,
         "restores the site, for a norm and its linear layer in one"),
    Seam(f"{TE}.linear", "allreduce", REDUCE, transformer_engine.all_reduce,
         "row all-reduce, and of a column layer's gradient; linear.py's own binding, looked up at every call"),
    Seam(f"{TE}.linear", "reduce_scatter_along_first_dim", REDUCE, transformer_engine.reduce_scatter,
         "row reduce-scatter under sequence parallelism, and of a column layer's gradient; linear.py's own binding"),
    Seam(f"{TE}.linear", "gather_along_first_dim", GATHER, transformer_engine.gather,
         "column all-gather under sequence parallelism, forward and again for the weight gradient"),
    Seam(f"{TE}.layernorm_linear", "allreduce", REDUCE, transformer_engine.all_reduce,
         "all-reduce of the gradient before a norm; layernorm_linear.py's own binding"),
    Seam(f"{TE}.layernorm_linear", "reduce_scatter_along_first_dim", REDUCE, transformer_engine.reduce_scatter,
         "reduce-scatter of the gradient before a norm; layernorm_linear.py's own binding"),
    Seam(f"{TE}.layernorm_linear", "gather_along_first_dim", GATHER, transformer_engine.gather,
         "column all-gather after a norm; layernorm_linear.py's own binding"),
    Seam(f"{TE}.base", "gather_along_first_dim", GATHER, transformer_engine.gather,
         "all-gather of a row layer's gradient under sequence parallelism; base.py's own binding"),
)  # fmt: skip

# Layers of --transformer-impl inference_optimized do not call their parents outside of training. What their kernels
# over NVLink SHARP (NVLS) move is counted as "NVLS kernel"; what they send by name is compressed.
INFERENCE_0_16 = (
    Seam(INFERENCE, "InferenceRowParallelLinear.forward", ("self", "x"), transformer_engine.layer_forward,
         "notes the row site outside of training; in training the parent's forward does",
         is_layer=True),
    Seam(INFERENCE, "InferenceLayerNormColumnParallelLinear.forward", ("self", "x"), transformer_engine.layer_forward,
         "notes the column site outside of training",
         is_layer=True),
    Seam(INFERENCE, "reduce_scatter_along_first_dim", REDUCE, transformer_engine.reduce_scatter,
         "row reduce-scatter where no NVLS kernel runs; inference_layers.py's own binding"),
    Seam(INFERENCE, "gather_along_first_dim", GATHER, transformer_engine.gather,
         "column all-gather where no NVLS kernel runs; inference_layers.py's own binding"),
)  # fmt: skip
INFERENCE_0_17 = (
    Seam(INFERENCE, "InferenceColumnParallelLinear.forward", ("self", "x"), transformer_engine.layer_forward,
         "notes the column site of latent attention and multi-token prediction outside of training",
         is_layer=True),
)  # fmt: skip


def _counted(module: str, name: str, collective: str, reason: str, only_at: str | None = None) -> Seam:
    return Seam(module, name, (), counted.counter(reason, collective, only_at), "counts what stays exact there")


FIRST, LAST = "gather_from_sequence_parallel_region", "gather_from_tensor_model_parallel_region"
SCATTER, DSA = "reduce_scatter_to_sequence_parallel_region", f"{TRANSFORMER}.experimental_attention_variant"
COUNTED = (
    _counted(LAYERS, LAST, "all_gather", "gathered output of a column layer", only_at="column"),
    _counted(f"{TRANSFORMER}.multi_latent_attention", FIRST, "all_gather", "latent attention's position key"),
    _counted(f"{TRANSFORMER}.multi_latent_attention", LAST, "all_gather", "latent attention's last dimension"),
    _counted(f"{TRANSFORMER}.multi_token_prediction", LAST, "all_gather", "token prediction's last dimension"),
    _counted(f"{DSA}.dsa", FIRST, "all_gather", "DSA indexer"),
    _counted(f"{DSA}.absorbed_mla", FIRST, "all_gather", "absorbed latent attention"),
    _counted("megatron.core.fp8_utils", FIRST, "all_gather", "FP8-padded inference"),
    _counted("megatron.core.fp8_utils", SCATTER, "reduce_scatter", "FP8-padded inference"),
    _counted(f"{TRANSFORMER}.heterogeneous.linear_replacements", LAST, "all_gather", "heterogeneous replacement"),
    _counted(f"{TRANSFORMER}.heterogeneous.linear_replacements", SCATTER, "reduce_scatter",
             "heterogeneous replacement"),
)  # fmt: skip
SEAMS: tuple[Seam, ...] = (*ALWAYS, *SHARED_EXPERTS)
EVERY: tuple[Seam, ...] = (
    *SEAMS, *FUSED_SHARED_EXPERTS, *TOKENS, *TRANSFORMER_ENGINE, *INFERENCE_0_16, *INFERENCE_0_17, *COUNTED,
)  # fmt: skip


def rows_of(version: str, with_transformer_engine: bool, with_tokens: bool = False) -> tuple[Seam, ...]:
    """The rows that must fit a version of Megatron-Core, with or without Transformer Engine and experts' tokens."""
    release = Version(version).release
    found = SEAMS + (FUSED_SHARED_EXPERTS if release >= (0, 19) else ()) + (TOKENS if with_tokens else ())
    if not with_transformer_engine:
        return found
    inference = INFERENCE_0_16 if release >= (0, 16) else ()
    return found + TRANSFORMER_ENGINE + inference + (INFERENCE_0_17 if release >= (0, 17) else ())
