"""Ranks of this folder's tests all import Megatron: the server that forks them imports it once for all."""

from __future__ import annotations

import importlib.util

import ranks

if importlib.util.find_spec("megatron"):
    ranks.PRELOADED.append("megatron.core.tensor_parallel.layers")
