"""Number formats. Each file is one format with its encoder, decoder and wire layout; none knows a process group.

A codec turns a contiguous 1-D tensor into a 1-D uint8 *payload* whose length depends on the number of values
alone, and decodes one payload or the sum of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .published.microscaling import Microscaling
from .published.outlier import Outlier, Uncalibrated
from .raw import Raw
from .rotated import Rotated
from .spike import Spike
from .stochastic import Stochastic
from .uniform import Uniform

__all__ = [
    "Codec", "Microscaling", "Outlier", "Raw", "Remembering", "Rotated", "Spike", "Stochastic",
    "Uncalibrated", "Uniform",
]  # fmt: skip


class Codec(Protocol):
    """What a collective needs of a number format. Codecs are immutable and hashable."""

    @property
    def block(self) -> int:
        """Values that share metadata; tensors are cut into slices at multiples of it."""

    def wire_bytes(self, numel: int) -> int:
        """Length in bytes of the payload of ``numel`` values."""

    def encode(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Payload (uint8, 1-D) of a contiguous 1-D floating tensor, written into ``out`` if given."""

    def decode_sum(self, payloads: Sequence[Tensor], out: Tensor) -> Tensor:
        """Write the float32 sum, in order, of the decoded payloads into the 1-D tensor ``out``."""


class Remembering(Codec, Protocol):
    """A codec that can add what one encoding lost to the next one (rotated.py)."""

    def memory_numel(self, numel: int) -> int:
        """Numbers that the memory of a tensor of ``numel`` values has."""

    def encode(self, x: Tensor, out: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """As Codec.encode; ``memory``, of the dtype of ``x`` and zeros at first, becomes what this encoding loses."""
