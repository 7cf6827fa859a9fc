"""Switching on and off, and the number format by itself: the functions a user calls besides the collectives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..codec import Codec
from ..config import Config, current, set_current
from . import installation


def enable(config: Config | None = None, **options: Any) -> None:
    """Compress Megatron's tensor-parallel collectives from now on: ``enable(Config(bits=4))`` or ``enable(bits=4)``.

    May be called before or after Megatron is imported, and again with other options. Every rank must call it alike.
    Raises ValueError for an option no recipe knows, RuntimeError if the installed Megatron does not fit.
    """
    if config is not None and options:
        raise ValueError(f"enable() takes a Config or options, found both ({', '.join(options)}).")
    if config is not None and not isinstance(config, Config):
        raise ValueError(f"enable({config!r}): expected a Config, or options by name as in enable(bits=4).")
    installation.switch_on(config or Config(**options))


def disable() -> None:
    """Restore every replaced Megatron object and switch compression off."""
    installation.uninstall()
    set_current(None)


@contextmanager
def flashcomm(config: Config | None = None, **options: Any) -> Iterator[None]:
    """``with flashcomm(bits=4):`` enables inside the block and restores what was in force before it."""
    before = current()
    enable(config, **options)
    try:
        yield
    finally:
        if before is None:
            disable()
        else:
            enable(before)


def encode(x: Tensor, config: Config, leg: str = "reduce") -> Tensor:
    """Payload (uint8, 1-D, ``wire_bytes(x.shape, config)`` long) of a floating tensor of any shape.

    Its rows, along the last dimension, are encoded each by itself. ``leg`` is "reduce" or "gather"; they differ where a
    recipe gives the legs different widths.
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"encode: expected float32, float16 or bfloat16, found {x.dtype}.")
    return _codec(config, leg).encode(x.detach().reshape(-1).contiguous(), width=_width(x.shape))


def decode(payload: Tensor, shape: Sequence[int], dtype: torch.dtype, config: Config, leg: str = "reduce") -> Tensor:
    """Values of a payload as a tensor of ``shape`` and ``dtype``; ValueError if its length does not fit ``shape``."""
    out = torch.empty(tuple(shape), dtype=dtype, device=payload.device)
    expected = wire_bytes(out.shape, config, leg)
    if payload.dtype != torch.uint8 or payload.numel() != expected:
        raise ValueError(
            f"decode: expected {expected} bytes (uint8) for {list(shape)}, "
            f"found {payload.numel()} of {str(payload.dtype).removeprefix('torch.')}."
        )
    _codec(config, leg).decode_sum([payload.reshape(-1).contiguous()], out.view(-1), _width(out.shape))
    return out


def wire_bytes(shape: int | Sequence[int], config: Config, leg: str = "reduce") -> int:
    """Bytes on the wire of a tensor of ``shape``, metadata included; a number stands for one row of so many values."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return _codec(config, leg).wire_bytes(math.prod(shape), _width(shape))


def _width(shape: Sequence[int]) -> int | None:
    """Values of a row; None: all values are one."""
    return shape[-1] if len(shape) > 1 and shape[-1] else None


def _codec(config: Config, leg: str) -> Codec:
    legs: dict[str, Codec] = config.legs._asdict()
    if leg not in legs:
        raise ValueError(f"leg {leg!r}: choose {' or '.join(legs)}.")
    return legs[leg]
