"""Running a collective's algorithm: to its end, or in the background behind a handle.

An asynchronous collective is at work from its start: on CPUs the communicator's thread finishes it, on GPUs it is
launched on a stream of its own. Work is begun in the order of the calls, which is the same on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from ..observe import counters
from .algorithms import Steps
from .plan import Plan, Site


def finish(steps: Steps, result: Tensor, plan: Plan, site: Site | None = None) -> Tensor:
    """Run a collective now, behind those begun before, and return its result."""
    progress = plan.comm.progress
    if progress.open:
        progress.drain()
    try:
        _run(steps, plan)
    except RuntimeError as error:
        raise _with_layer_name(error, site)  # noqa: B904  (it has its cause)
    return result


def _run(steps: Steps, plan: Plan) -> None:
    """Run a collective. Entering a context costs microseconds, so only those that are called for are entered."""
    started = time.perf_counter()
    if torch.is_grad_enabled():
        with torch.no_grad(), profiled(plan):
            _wait_for_each(steps)
    elif torch._C._autograd._profiler_enabled():
        with profiled(plan):
            _wait_for_each(steps)
    else:
        _wait_for_each(steps)
    counters.count_quantized(plan, time.perf_counter() - started)


def _wait_for_each(steps: Steps) -> None:
    for transfer in steps:
        transfer.wait()


class Handle:
    """A started collective. ``wait()`` returns its result; waiting twice is allowed."""

    def __init__(self, steps: Steps, result: Tensor, plan: Plan, site: Site | None = None) -> None:
        self._steps, self._result, self._plan, self._site = steps, result, plan, site
        self._is_done = False
        self._error: BaseException | None = None
        self._event: Any = None  # on a GPU: when the result is there

    def start(self, *inputs: Tensor) -> Handle:
        """Begin the collective, which also reads ``inputs``, and return at once."""
        if self._result.is_cuda:
            self._launch_on_side_stream(inputs)
        else:
            in_same_mode = torch.inference_mode(torch.is_inference_mode_enabled())  # which belongs to a thread
            self._plan.comm.progress.submit(in_same_mode(self._run))
        return self

    def is_completed(self) -> bool:
        """Whether the result is there: wait() would return at once."""
        return self._is_done and (self._event is None or self._event.query())

    def wait(self) -> Tensor:
        """Block (on a GPU: make the current stream wait) until the result is there, and return it; or its error."""
        if not self._is_done:
            self._plan.comm.progress.wait_for(lambda: self._is_done)
        if self._error is not None:
            self._error = _with_layer_name(self._error, self._site)
            self._site = None
            raise self._error
        if self._event is not None:
            torch.cuda.current_stream(self._result.device).wait_event(self._event)
        return self._result

    def _run(self) -> None:
        try:
            _run(self._steps, self._plan)
        except BaseException as error:
            self._error = error
        self._is_done = True

    def _launch_on_side_stream(self, inputs: Sequence[Tensor]) -> None:
        """Launch everything on a stream of its own, behind what the current one holds.

        Torch's allocator must know: a tensor that its owner drops before that stream is done would be given away.
        """
        device = self._result.device
        side = side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._run()
            self._event = side.record_event()
        for tensor in (self._result, *inputs):
            tensor.record_stream(side)


class Launched:
    """Handle of a collective that was left to torch.distributed, or that one kernel does."""

    def __init__(self, result: Tensor, work: dist.Work | None) -> None:
        self._result, self._work = result, work

    def wait(self) -> Tensor:
        """Block until the result is there, and return it."""
        if self._work is not None:
            self._work.wait()
        return self._result


def _with_layer_name(error: BaseException, site: Site | None) -> BaseException:
    """The error with the layer's name, where there is one."""
    if site is None or not isinstance(error, RuntimeError) or not str(error).startswith("flash-comm: #"):
        return error
    named = RuntimeError(f"{error} (This rank was in {site.name}.)")
    named.__cause__ = error
    return named


def profiled(plan: Plan) -> AbstractContextManager[Any]:
    """A range of the profiler that is recording, if one is: torch.profiler, or Nsight through emit_nvtx.

    Its name says the place and the bytes, as in "flash-comm row: 270592 of 1048576 bytes". Of asynchronous calls on
    CPUs there is none: torch.profiler does not see their thread.
    """
    if not torch._C._autograd._profiler_enabled():
        return _NOTHING
    return record_function(f"flash-comm {plan.label}: {plan.wire_bytes} of {plan.exact_bytes} bytes")


_NOTHING: AbstractContextManager[Any] = nullcontext()
_side_streams: dict[torch.device, Any] = {}


def side_stream(device: torch.device) -> Any:
    """The stream of this process on which asynchronous collectives run."""
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _side_streams[device]
