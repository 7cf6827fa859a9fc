"""Where a layer stands in its model: its name, the row-parallel layers beside it, whether it is the output layer.

Megatron's layers do not know their names. The first time one is asked for, while its model runs, the modules that the
running functions know by a name of their own are noted, the outermost first, with all that they hold; from then on a
name is a walk upwards. It ends at the outermost of Megatron's modules, or of all modules where none is Megatron's.
Wrappers call their only child ``module`` (DistributedDataParallel, Float16Module) or ``_orig_mod`` (torch.compile);
those parts of a name are dropped, so a wrapped model is the same model. So a new model is met in its first forward,
whoever built it when, copies included. torch.compile, which breaks its graph at a layer's forward, must not look into
any of this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn

from .patching import untraced

WRAPPERS = ("module", "_orig_mod")
ROW_PARALLEL = "RowParallelLinear"  # in the class name of every implementation of the layer, or of its base
MAKERS = ("megatron", "transformer_engine")  # packages; others have classes of that name that never meet us

_holders: WeakKeyDictionary[nn.Module, tuple[ReferenceType[nn.Module], str]] = WeakKeyDictionary()
_is_output: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_tell: Callable[[nn.Module], None] | None = None


def watch(tell: Callable[[nn.Module], None] | None) -> None:
    """Have ``tell`` called with every model that is met from now on, until this is called with None."""
    global _tell
    _tell = tell
    _holders.clear()
    _is_output.clear()


@untraced
def name(layer: nn.Module) -> str:
    """``layer``'s name inside its model; its class where no other module holds it."""
    return _joined([part for _, part in _way_up(layer)]) or type(layer).__name__


@untraced
def row_layers(layer: nn.Module) -> dict[str, Any]:
    """Name and module of every row-parallel layer of the model around ``layer``.

    Without those of experts, which leave communication to their dispatcher.
    """
    way = _way_up(layer)
    model = way[0][0] if way else layer
    return {_joined(path.split(".")): each for path, each in model.named_modules() if communicates_as_row(each)}


def communicates_as_row(module: Any) -> bool:
    """Whether a module is Megatron's row-parallel layer or Transformer Engine's, and sums by itself."""
    if not is_kind(module, ROW_PARALLEL):
        return False
    is_expert = getattr(module, "is_expert", False) or getattr(module, "explicit_expert_comm", False)
    return not is_expert and getattr(module, "parallel_mode", "row") == "row"


def is_kind(module: Any, word: str) -> bool:
    """Whether ``word`` is in the name of a module's class, or of one that it inherits from, of Megatron's making."""
    return any(word in kind.__name__ and kind.__module__.split(".")[0] in MAKERS for kind in type(module).__mro__)


def output_width(row: Any) -> int:
    """Features of a row-parallel layer's output, by Megatron's name for them or Transformer Engine's."""
    width: int = row.output_size if hasattr(row, "output_size") else row.out_features
    return width


@untraced
def is_output_layer(module: Any, weight: Tensor | None) -> bool:
    """Whether a column-parallel layer makes the logits: its model calls it ``output_layer``.

    Only an output layer is handed its weight (the embedding's). Megatron marks the weight of one that owns it as well,
    but the mark is lost under FSDP2, after ``load_state_dict(assign=True)`` and when a meta tensor becomes a real one.
    """
    if weight is not None or getattr(getattr(module, "weight", None), "is_embedding_or_output_parameter", False):
        return True
    if module not in _is_output:
        _is_output[module] = name(module).rpartition(".")[2] == "output_layer"
    return _is_output[module]


def _way_up(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Holders of ``layer`` and what each calls the next one, the model first."""
    if layer not in _holders:
        _note_running()
    way: list[tuple[nn.Module, str]] = []
    while layer in _holders and len(way) < 100:
        holder, part = _holders[layer]
        found = holder()
        if found is None:
            break
        way.insert(0, (found, part))
        layer = found
    megatrons = [place for place, (module, _) in enumerate(way) if _is_megatrons(module)]
    return way[megatrons[0] :] if megatrons else way


def _note_running() -> None:
    """Note who holds whom in the modules that functions running on this thread know."""
    found, frame = [], sys._getframe()
    while frame is not None:
        known = list(frame.f_locals.values())
        found += [value for value in known if issubclass(type(value), nn.Module) and hasattr(value, "_modules")]
        frame = frame.f_back  # type: ignore[assignment]
    for root in dict.fromkeys(reversed(found)):
        if root not in _holders:
            _note(root)
            if _tell is not None:
                _tell(root)


def _note(root: nn.Module) -> None:
    for module in root.modules():
        for part, child in module._modules.items():
            if child is not None and (child not in _holders or _holders[child][0]() is None):
                _holders[child] = ref(module), part


def _is_megatrons(module: nn.Module) -> bool:
    return any(kind.__name__ == "MegatronModule" for kind in type(module).__mro__)


def _joined(parts: list[str]) -> str:
    return ".".join(part for part in parts if part not in WRAPPERS)
