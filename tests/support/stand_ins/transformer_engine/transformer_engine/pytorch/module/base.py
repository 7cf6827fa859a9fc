"""What the layers share: parameters, parallel dimension, and the gradient's gather in backward."""

from typing import Any

import torch
from torch import Tensor

from ..distributed import gather_along_first_dim


class TransformerEngineBaseModule(torch.nn.Module):
    """A linear layer cut along one dimension or none; options that change nothing here are ignored."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        init_method: Any = torch.nn.init.normal_,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype | None = None,
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        symmetric_ar_type: str | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.tp_group, self.tp_size = tp_group, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.parallel_mode, self.symmetric_ar_type = parallel_mode, symmetric_ar_type
        self.ub_overlap_ag_fprop, self.ub_overlap_rs_fprop = ub_overlap_ag, ub_overlap_rs
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=params_dtype))
        init_method(self.weight.data)
        self.quantizer: Any = None

    @staticmethod
    def grad_output_preprocess(ctx: Any, grad_output: Tensor) -> Tensor:
        """The whole gradient of the output, gathered where forward scattered it."""
        if ctx.layer.parallel_mode == "row" and ctx.layer.sequence_parallel:
            grad_output, _ = gather_along_first_dim(grad_output, ctx.layer.tp_group)
        return grad_output
