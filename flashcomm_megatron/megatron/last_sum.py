"""More bits for the last sum of a deep model.

With residual feedback the stream carries one rounding error at a time: the last one, whatever the layers before lost.
What the last sum of the model loses is repaid by nobody and goes into the logits as it is. In SmolLM2-135M at 4 bits
it is 40 % of the loss (docs/log.md). One site of a deep model costs little: with a bit more for every 15 layers a
value of the whole model takes at most 1/30 bit more, whatever the width. Models of fewer layers have none.

The last sum is that of the last row-parallel layer in the transformer layer whose ``layer_number`` is the
configuration's ``num_layers``; Megatron counts through all pipeline stages, so no other stage has one. All ranks of a
tensor-parallel group hold the same layers, so they agree.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..config import Config
from . import model
from .patching import untraced

_depths: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def bits(config: Config, layer: nn.Module) -> int | None:
    """Bits of the sum of a row-parallel layer if it is its model's last one and takes others than the rest, or None."""
    if layer not in _depths:
        _depths[layer] = _depth(layer)
    found = config.last_sum(_depths[layer]) if _depths[layer] else config.bits
    return found if found != config.bits else None


@untraced
def _depth(layer: nn.Module) -> int:
    """Layers of the model whose last sum is ``layer``'s; 0 where another one follows, or nobody knows."""
    for holder, _ in model.way_up(layer):
        number, config = getattr(holder, "layer_number", None), getattr(holder, "config", None)
        if number is not None:
            is_last = number == getattr(config, "num_layers", None)
            return int(number) if is_last and layer is _last_row(holder, config) else 0
    return 0


def _last_row(holder: nn.Module, config: Any) -> Any:
    """The row-parallel layer of a transformer layer that adds to the stream last; no low-rank adapter beside it."""
    rows = [each for each in holder.modules() if model.communicates_as_row(each)]
    return [each for each in rows if model.output_width(each) == config.hidden_size][-1]
