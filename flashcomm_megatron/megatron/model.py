"""Where a layer stands in its model: its name, the row-parallel layers beside it, whether it is the output layer.

Megatron's layers do not know their names. Torch tells of every module that is built who holds it, as long as a model is
watched (coverage.py); of one that was built before, or copied, the garbage collector knows, when a name in it is first
asked for. A name is a walk upwards. It ends at the outermost of Megatron's modules, or of all modules where none is
Megatron's. Wrappers call their only child ``module`` (DistributedDataParallel, Float16Module) or ``_orig_mod``
(torch.compile); those parts of a name are dropped, so a wrapped model is the same model. torch.compile, which breaks
its graph at a layer's forward, must not look into any of this.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

from torch import Tensor, nn

from .patching import untraced

WRAPPERS = ("module", "_orig_mod")
ROW_PARALLEL = "RowParallelLinear"  # in the class name of every implementation of the layer, or of its base
MAKERS = ("megatron", "transformer_engine")  # packages; others have classes of that name that never meet us

_holders: WeakKeyDictionary[nn.Module, tuple[ReferenceType[nn.Module], str]] = WeakKeyDictionary()
_is_output: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_tops: WeakSet[nn.Module] = WeakSet()  # held by none when it was looked for
_tell: Callable[[Iterable[nn.Module]], None] | None = None


def watch(tell: Callable[[Iterable[nn.Module]], None] | None) -> None:
    """Have ``tell`` called with modules that were not built in our sight, when they are met; until called with None."""
    global _tell
    _tell = tell


def hold(holder: nn.Module, part: str, child: nn.Module | None) -> None:
    """Note that ``holder`` calls ``child`` ``part``. A child of several keeps the first that is alive."""
    if child is not None and (child not in _holders or _holders[child][0]() is None):
        _holders[child] = ref(holder), part


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
        is_output = name(module).rpartition(".")[2] == "output_layer"
        if module not in _holders:  # not known yet
            return False
        _is_output[module] = is_output
    return _is_output[module]


def _way_up(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Holders of ``layer`` and what each calls the next one, the model first."""
    way = _walk(layer)
    top = way[0][0] if way else layer
    if top not in _tops:  # it may be held by what was built before, or copied
        _note_all()
        way = _walk(layer)
        _tops.add(way[0][0] if way else layer)
    for place, (module, _) in enumerate(way):
        if any(kind.__name__ == "MegatronModule" for kind in type(module).__mro__):
            return way[place:]
    return way


def _walk(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    way: list[tuple[nn.Module, str]] = []
    while layer in _holders and len(way) < 100:
        holder, part = _holders[layer]
        found = holder()
        if found is None:
            break
        way.insert(0, (found, part))
        layer = found
    return way


def _note_all() -> None:
    """Note who holds whom, for every module that the garbage collector knows."""
    alive = [each for each in gc.get_objects() if issubclass(type(each), nn.Module) and "_modules" in vars(each)]
    new = [module for module in alive if module not in _holders and module not in _tops]
    for module in alive:
        for part, child in module._modules.items():
            hold(module, part, child)
    if _tell is not None:
        _tell(new)


def _joined(parts: list[str]) -> str:
    return ".".join(part for part in parts if part not in WRAPPERS)
