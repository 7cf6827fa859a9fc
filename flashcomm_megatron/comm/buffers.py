"""Memory for the payloads of calls. Small ones are views of memory that is kept, made once for each list of lengths.

A new tensor and a view cost the host several microseconds each, more than encoding what is small. So a communicator
keeps ``KEPT`` bytes for every stream on which it was called, and a call takes them for as long as it is under way: what
is started meanwhile, on another stream or from another thread, has memory of its own. Calls of one stream follow each
other there, as with the caching allocator's memory. What a CUDA graph captures lies in the graph's own pool.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 1 << 20  # bytes; larger calls take longer to travel than tensors to make
ALIGNED = 512  # as the caching allocator's
LISTS = 1024  # of lengths whose views are kept


class Lengths(NamedTuple):
    """Bytes of a call's payloads; a leg that is not there has none."""

    outbox: int
    inbox: int
    gathered: int
    own: int  # of this rank's place in ``gathered``
    place: int  # where that begins


class Boxes(NamedTuple):
    """uint8 tensors of a call's payloads."""

    outbox: Tensor
    inbox: Tensor
    gathered: Tensor
    own: Tensor  # this rank's place in ``gathered``
    home: Kept | None  # whose views they are


class Kept:
    """The memory of one stream, and the views of it that calls asked for."""

    def __init__(self, key: tuple[torch.device, int]) -> None:
        self.key = key
        with torch.inference_mode(False):  # else it could not be written to outside
            self.memory = torch.empty(KEPT, dtype=torch.uint8, device=key[0])
        self.views: dict[Lengths, Boxes] = {}


class Buffers:
    """The memory of one communicator."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.device, int], Kept] = {}

    def take(self, lengths: Lengths, device: torch.device) -> Boxes:
        """Boxes of these ``lengths`` for a call on the current stream of ``device``."""
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return _boxes(lengths, device)
            key = device, torch.cuda.current_stream(device).cuda_stream
        else:
            key = device, 0
        kept = self._free.pop(key, None) or Kept(key)
        boxes = kept.views.get(lengths) or _views(lengths, kept)
        if boxes.home is None:
            self._free[key] = kept
        return boxes

    def give_back(self, boxes: Boxes) -> None:
        """Let later calls of the stream have the memory. Of a call that failed it is not: messages may still come."""
        if boxes.home is not None:
            self._free[boxes.home.key] = boxes.home


def _views(lengths: Lengths, kept: Kept) -> Boxes:
    """Views of kept memory; tensors of their own where it is too small."""
    starts, end = [], 0
    for length in lengths[:3]:
        starts.append(end)
        end += -(-length // ALIGNED) * ALIGNED
    if end > KEPT:
        return _boxes(lengths, kept.memory.device)
    with torch.inference_mode(False):
        boxes = [kept.memory[start : start + length] for start, length in zip(starts, lengths, strict=False)]
        found = _with_own(lengths, boxes, kept)
    if len(kept.views) >= LISTS:
        kept.views.clear()
    kept.views[lengths] = found
    return found


def _boxes(lengths: Lengths, device: torch.device) -> Boxes:
    return _with_own(lengths, [torch.empty(each, dtype=torch.uint8, device=device) for each in lengths[:3]], None)


def _with_own(lengths: Lengths, boxes: list[Tensor], home: Kept | None) -> Boxes:
    outbox, inbox, gathered = boxes
    return Boxes(outbox, inbox, gathered, gathered[lengths.place : lengths.place + lengths.own], home)
