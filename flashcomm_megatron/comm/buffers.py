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


Views = tuple[Tensor, Tensor, Tensor, Tensor]  # all of Boxes but their home


class Kept:
    """Memory of one stream, and the views of it that calls asked for."""

    def __init__(self, key: tuple[torch.device, int]) -> None:
        self.key = key
        with torch.inference_mode(False):  # else it could not be written to outside
            self.memory = torch.empty(KEPT, dtype=torch.uint8, device=key[0])
        self.views: dict[Lengths, Views] = {}

    def boxes(self, lengths: Lengths) -> Boxes:
        """Views of these ``lengths``, with this as their home."""
        found = self.views.get(lengths)
        if found is None:
            with torch.inference_mode(False):
                inbox = _aligned(lengths.outbox)
                starts = 0, inbox, inbox + _aligned(lengths.inbox)
                parts = [self.memory[start : start + size] for start, size in zip(starts, lengths, strict=False)]
                found = _with_own(parts, lengths)
            if len(self.views) >= LISTS:
                self.views.clear()
            self.views[lengths] = found
        return Boxes(*found, self)


class Buffers:
    """The memory of one communicator."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.device, int], list[Kept]] = {}

    def take(self, lengths: Lengths, device: torch.device) -> Boxes:
        """Boxes of these ``lengths`` for a call on the current stream of ``device``."""
        is_small = lengths.outbox + lengths.inbox + lengths.gathered <= KEPT - 2 * ALIGNED
        if not is_small or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            parts = [torch.empty(size, dtype=torch.uint8, device=device) for size in lengths[:3]]
            return Boxes(*_with_own(parts, lengths), None)
        key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        free = self._free.get(key)
        return (free.pop() if free else Kept(key)).boxes(lengths)

    def give_back(self, boxes: Boxes) -> None:
        """Let later calls of the stream have the memory. Of a call that failed it is not: messages may still come."""
        if boxes.home is not None:
            self._free.setdefault(boxes.home.key, []).append(boxes.home)


def _with_own(parts: list[Tensor], lengths: Lengths) -> Views:
    outbox, inbox, gathered = parts
    return outbox, inbox, gathered, gathered[lengths.place : lengths.place + lengths.own]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
