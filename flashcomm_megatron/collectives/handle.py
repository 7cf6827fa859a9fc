"""One call of a collective: its group and configuration, its link, and the handle that finishes it.

An asynchronous call stops at its first transfer; the handle's ``wait()`` finishes the arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import links
from ..comm.link import Link, Transfer
from ..config import Config, current
from ..observe import counters
from ..observe import error_sampling as sampling
from . import agreement
from .algorithms import Steps


def resolve(group: dist.ProcessGroup | None, config: Config | None) -> tuple[dist.ProcessGroup, Config]:
    """The group and the configuration that a call without them means. ValueError if flash-comm is off."""
    config = config or current()
    if config is None:
        raise ValueError("flash-comm is off: pass config=Config(bits=4) or call enable(bits=4) first.")
    if not isinstance(config, Config):
        raise ValueError(f"config={config!r}: expected a Config, as in config=Config(bits=4).")
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("flash-comm has no process group: call torch.distributed.init_process_group() first.")
    return group, config


def link(kind: str, shape: Sequence[object], x: Tensor, group: dist.ProcessGroup, config: Config) -> Link:
    """This rank's end for a call that errors name by ``kind``, ``shape`` (alike on every rank), dtype and site."""
    words = (kind, list(shape), str(x.dtype).removeprefix("torch."), sampling.site())
    text = " ".join(str(word) for word in words if word is not None)
    return links.link(group, x.device, config, text, agreement.digest(config))


def run(steps: Steps, exact_bytes: int, wire_bytes: int, async_op: bool) -> Any:
    """The result of ``steps``, or the handle of them started."""
    handle = Handle(steps, exact_bytes, wire_bytes)
    return handle if async_op else handle.wait()


def exact(result: Tensor, work: dist.Work | None, async_op: bool) -> Any:
    """The result, or the handle, of a collective that was left to torch.distributed."""
    return Exact(result, work) if async_op else result


class Handle:
    """A started collective. ``wait()`` finishes it and returns its result; waiting twice is allowed."""

    def __init__(self, steps: Steps, exact_bytes: int, wire_bytes: int) -> None:
        self._steps = steps
        self._bytes = exact_bytes, wire_bytes
        self._seconds = 0.0
        self._transfers: Sequence[Transfer] = []
        self._result: Tensor | None = None
        self._error: BaseException | None = None
        self._advance()

    def wait(self) -> Tensor:
        """Block (on a GPU: make the current stream wait) until the result is there, and return it; or its error."""
        while self._result is None:
            if self._error is not None:
                raise self._error
            self._advance()
        return self._result

    @torch.no_grad()
    def _advance(self) -> None:
        started = time.perf_counter()
        try:
            self._receive()
            self._transfers = next(self._steps)
        except StopIteration as end:
            self._result = end.value
        except BaseException as error:
            self._error = error
            raise
        self._seconds += time.perf_counter() - started
        if self._result is not None:
            counters.count_quantized(*self._bytes, self._seconds)

    def _receive(self) -> None:
        try:
            for transfer in self._transfers:
                transfer.wait()
        except RuntimeError as error:
            layer = sampling.layer()
            if layer is None:
                raise
            raise RuntimeError(f"{error} (This rank was in {layer}.)") from error


class Exact:
    """Handle of a collective that was left to torch.distributed."""

    def __init__(self, result: Tensor, work: dist.Work | None) -> None:
        self._result, self._work = result, work

    def wait(self) -> Tensor:
        """Block until the result is there, and return it."""
        if self._work is not None:
            self._work.wait()
        return self._result
