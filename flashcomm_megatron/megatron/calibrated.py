"""The codecs that a calibrated recipe has for each row-parallel layer: a calibration file knows a layer by its name."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

from .. import collectives
from ..codec.published import ranges
from ..codec.published.outlier import from_ranges
from ..codec.recipes import Legs
from ..config import Config
from .model import output_width, row_layers

_legs: WeakKeyDictionary[nn.Module, tuple[Config, Legs]] = WeakKeyDictionary()


def legs(config: Config, layer: nn.Module, group: dist.ProcessGroup) -> Legs | None:
    """Codecs of ``layer`` under a calibrated recipe, None under any other.

    ValueError if the calibration file is missing, broken, or was made for another model or number of ranks.
    """
    if config.calibration is None or group.size() == 1:
        return None
    if layer not in _legs or _legs[layer][0] != config:
        _read(config, config.calibration, layer, group)
    return _legs[layer][1]


def _read(config: Config, path: str, layer: nn.Module, group: dist.ProcessGroup) -> None:
    """Note the codecs of every layer of the model that the file knows."""
    collectives.agree(group, config)  # before a file is read, which may fail on this rank alone
    file, rows = ranges.load(path), row_layers(layer)
    ranges.check(file, {name: output_width(each) for name, each in rows.items()}, group.size())
    for name, (low, high) in file.layers.items():
        _legs[rows[name]] = config, config.legs._replace(reduce=from_ranges(low, high, group.rank()))
    missing = [name for name, each in rows.items() if each is layer and name not in file.layers]
    if missing:
        raise ValueError(
            f"--flash-comm-calibration {path} was made for another model: it has no layer {missing[0]}. {ranges.AGAIN}"
        )
