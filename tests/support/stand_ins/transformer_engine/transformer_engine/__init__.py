"""A stand-in for Transformer Engine, as far as Megatron's layers and our seams see it.

It has the package's import layering, its names and their signatures, and computes with torch. The collectives are
functions of ``pytorch.distributed`` that each file of ``pytorch.module`` imports by name and resolves at every call,
inside an autograd function that is called without a context where no gradient is recorded.
"""

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.6.0"  # the last before Megatron wants a fused router as well
