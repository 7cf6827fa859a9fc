"""Collectives: each returns the result and a handle, None where it is synchronous."""

from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor


class CudaRNGStatesTracker:
    """Megatron derives a class of its own from it."""


activation_recompute_forward = nullcontext


def allreduce(inp: Tensor, tp_group: Any = None, async_op: bool = False) -> tuple[Tensor, Any]:
    """Sum in place."""
    return inp, dist.all_reduce(inp, group=tp_group, async_op=async_op)


def symmetric_all_reduce(
    inp: Tensor, tp_group: Any = None, async_op: bool = False, all_reduce_type: str = "multimem_all_reduce"
) -> tuple[Tensor, Any]:
    """Sum in place, over symmetric memory in the real package."""
    return inp, dist.all_reduce(inp, group=tp_group, async_op=async_op)


def reduce_scatter_along_first_dim(inp: Tensor, tp_group: Any, async_op: bool = False) -> tuple[Tensor, Any]:
    """This rank's slice of the sum."""
    out = inp.new_empty(inp.size(0) // tp_group.size(), *inp.shape[1:])
    return out, dist.reduce_scatter_tensor(out, inp.contiguous(), group=tp_group, async_op=async_op)


def gather_along_first_dim(
    inp: Tensor, process_group: Any, async_op: bool = False, quantizer: Any = None
) -> tuple[Tensor, Any]:
    """All ranks' tensors, quantized if there is a quantizer."""
    inp = inp if quantizer is None else quantizer(inp)
    out = inp.new_empty(process_group.size() * inp.size(0), *inp.shape[1:])
    return out, dist.all_gather_into_tensor(out, inp.contiguous(), group=process_group, async_op=async_op)
