"""More bits for the last sum of a deep model.

With residual feedback the stream carries one rounding error at a time: the last one, whatever the layers before lost.
What the last sum of the model loses is repaid by nobody and goes into the logits as it is. In SmolLM2-135M at 4 bits
it is 40 % of the loss (docs/log.md). One site of a deep model costs little: with a bit more for every 15 layers a
value of the whole model takes at most 1/30 bit more, whatever the width. Models of fewer layers have none.

The last sum is that of the last row-parallel layer in the transformer layer whose ``layer_number`` is the
configuration's ``num_layers``; Megatron counts through all pipeline stages, so no other stage has one. It is noted when
that layer's forward begins, before its rows run. A row that ran elsewhere before, since layers share it, is an
ordinary one. So the answer follows from the modules and the order in which they run, which all ranks have in common.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from ..config import Config
from . import model
from .patching import untraced

_entered: WeakSet[nn.Module] = WeakSet()  # transformer layers
_depths: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # row layers: layers of a model whose last it is, or 0


@untraced
def bits(config: Config, row: nn.Module) -> int | None:
    """Bits of the sum of a row-parallel layer if it is its model's last one and takes others than the rest, or None."""
    depth = _depths.setdefault(row, 0)
    found = config.last_sum(depth) if depth else config.bits
    return found if found != config.bits else None


def entered(layer: nn.Module) -> None:
    """Note that the forward of a transformer layer begins."""
    if layer in _entered:
        return
    _entered.add(layer)
    number, config = getattr(layer, "layer_number", None), getattr(layer, "config", None)
    if number is not None and number == getattr(config, "num_layers", None):
        width = getattr(config, "hidden_size", None)  # low-rank adapters beside a layer have another
        rows = [row for row in layer.modules() if model.communicates_as_row(row) and model.output_width(row) == width]
        if rows:
            _depths.setdefault(rows[-1], int(number))
