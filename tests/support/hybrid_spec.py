"""Megatron's specification of hybrid models, with its own attention in the place of Transformer Engine's.

For ``pretrain_hybrid.py --spec hybrid_spec hybrid_stack_spec``, on stand-ins for Transformer Engine and mamba_ssm.
"""

from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention

hybrid_stack_spec.submodules.attention_layer.submodules.self_attention.submodules.core_attention = DotProductAttention
