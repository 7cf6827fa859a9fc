"""Quantized tensor-parallel communication for Megatron-LM.

- ``enable(bits=4)``, ``disable()``, ``with flashcomm(bits=4):`` switch compression of Megatron on and off.
- ``Config`` is everything that can be chosen; only ``bits`` is needed.
- ``all_reduce``, ``reduce_scatter``, ``all_gather``, ``all_to_all`` are the quantized collectives, on any group.
- ``encode``, ``decode``, ``wire_bytes`` are the number format of a configuration.
- ``stats``, ``reset_stats`` count what was compressed and what was not, and why; ``report`` says what was found.
- ``metrics``, ``log_metrics`` are these numbers, and the codec's sampled error, for W&B, TensorBoard or a file.
- ``add_arguments`` adds the ``--flash-comm-*`` flags to a parser; importing the package adds them to Megatron's.
"""

from .collectives import all_gather, all_reduce, reduce_scatter, stats
from .collectives.alltoall import all_to_all
from .config import Config
from .megatron.arguments import add_arguments, install
from .megatron.switch import decode, disable, enable, encode, flashcomm, wire_bytes
from .observe.counters import reset_stats
from .observe.metrics import log_metrics, metrics
from .tools.report import report
from .version import __version__

__all__ = [
    "Config",
    "__version__",
    "add_arguments",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "decode",
    "disable",
    "enable",
    "encode",
    "flashcomm",
    "log_metrics",
    "metrics",
    "reduce_scatter",
    "report",
    "reset_stats",
    "stats",
    "wire_bytes",
]

install()
