"""Triton for modules that import it and never launch it.

Some versions of Megatron import, for every model, modules whose Triton kernels only a GPU runs; a torch without CUDA
comes without Triton. While one of these modules is being imported, and only then, it finds a stand-in, so that all who
ask whether Triton is there still learn that it is not.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

CORE = "megatron.core"
USERS = (
    f"{CORE}.transformer.custom_layers.batch_invariant_kernels",
    f"{CORE}.inference.contexts.fused_kv_append_kernel",
    f"{CORE}.inference.contexts.attention_context.triton.tensor_ops",
    f"{CORE}.transformer.moe.ops.paged_stash",
    f"{CORE}.transformer.moe.paged_stash",
)
NAMES = ("triton", "triton.language")


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in USERS else None
        if spec is not None:
            self._lend(spec.loader)
        return spec

    def _lend(self, loader: Any) -> None:
        """Shadow ``exec_module`` on this one loader object."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            lent = {name: MagicMock() for name in NAMES if name not in sys.modules}
            sys.modules.update(lent)
            try:
                execute(module)
            finally:
                for name in lent:
                    del sys.modules[name]

        loader.exec_module = exec_module


_finder = _Finder()


def enter() -> None:
    """Lend it from now on, unless it is installed. Idempotent."""
    if _finder not in sys.meta_path and find_spec("triton") is None:
        sys.meta_path.insert(0, _finder)


def leave() -> None:
    """No longer. Idempotent."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
