"""FP8 tensors, of which there are none."""

from torch import Tensor


class QuantizedTensor(Tensor):
    """Megatron asks whether a parameter is one."""
