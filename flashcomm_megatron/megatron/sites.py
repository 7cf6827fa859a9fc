"""Row-parallel layers by name, and the codecs a calibrated recipe has for each.

A calibration file knows a layer by its name inside the model, which Megatron's layers do not carry. So the first time
a layer asks, the model is found: it is the outermost module whose forward is running. Wrappers call their only child
``module`` (DistributedDataParallel, Float16Module); that part of a name is dropped, so a wrapped model is the same
model.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

from ..codec.published import ranges
from ..codec.published.outlier import from_ranges
from ..codec.recipes import Legs
from ..config import Config

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


def row_layers(layer: nn.Module) -> dict[str, Any]:
    """Name and module of every row-parallel layer of the model around ``layer``, whose forward is running.

    Without those of experts, which leave communication to their dispatcher.
    """
    return {
        ".".join(part for part in path.split(".") if part != "module"): each
        for path, each in _model(layer).named_modules()
        if _is_row_parallel(each)
    }


def name(layer: nn.Module) -> str:
    """``layer``'s name inside the model whose forward is running; its class where there is none, as in backward."""
    names = (path for path, each in _model(layer).named_modules() if each is layer)
    return next(names) or type(layer).__name__


def _is_row_parallel(module: Any) -> bool:
    """Whether a module is Megatron's row-parallel layer or Transformer Engine's, and communicates by itself."""
    if not any(kind.__name__ in ("RowParallelLinear", "TERowParallelLinear") for kind in type(module).__mro__):
        return False
    is_expert = getattr(module, "is_expert", False) or getattr(module, "explicit_expert_comm", False)
    return not is_expert and getattr(module, "parallel_mode", "row") == "row"


def _width(row: Any) -> int:
    """Features of a row-parallel layer's output, by Megatron's name for them or Transformer Engine's."""
    width: int = row.output_size if hasattr(row, "output_size") else row.out_features
    return width


def _read(config: Config, path: str, layer: nn.Module, group: dist.ProcessGroup) -> None:
    """Note the codecs of every layer of the model that the file knows."""
    file, rows = ranges.load(path), row_layers(layer)
    ranges.check(file, {name: _width(each) for name, each in rows.items()}, group.size())
    for name, (low, high) in file.layers.items():
        _legs[rows[name]] = config, config.legs._replace(reduce=from_ranges(low, high, group.rank()))
    missing = [name for name, each in rows.items() if each is layer and name not in file.layers]
    if missing:
        raise ValueError(
            f"--flash-comm-calibration {path} was made for another model: it has no layer {missing[0]}. {ranges.AGAIN}"
        )


def _model(layer: nn.Module) -> nn.Module:
    """The outermost module whose method is on the stack and that contains ``layer``."""
    model, frame = layer, sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and any(each is layer for each in owner.modules()):
            model = owner
    return model
