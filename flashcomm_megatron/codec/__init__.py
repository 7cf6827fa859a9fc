"""Number formats. Each file is one format with its encoder, decoder and wire layout; none knows a process group."""

from __future__ import annotations

from .base import Codec, Slices
from .published.microscaling import Microscaling
from .published.outlier import Outlier, Uncalibrated
from .raw import Raw
from .rotated import Rotated
from .spike import Spike
from .uniform import Uniform

__all__ = ["Codec", "Microscaling", "Outlier", "Raw", "Rotated", "Slices", "Spike", "Uncalibrated", "Uniform"]
