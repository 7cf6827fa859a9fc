"""Memory of payloads: kept for small calls, one call's alone while it is under way."""

from __future__ import annotations

import gc
import weakref

import torch

from flashcomm_megatron.comm.buffers import KEPT, Buffers, Lengths

CPU, SMALL, LARGE = torch.device("cpu"), Lengths(4096, 4096, 2048, 512, 1024), Lengths(KEPT, 64, 128, 64, 64)


def addresses(boxes: tuple[object, ...]) -> list[int]:
    return [each.data_ptr() for each in boxes if isinstance(each, torch.Tensor)]


def test_boxes_have_their_lengths_and_do_not_overlap() -> None:
    for lengths in (SMALL, LARGE):
        boxes = Buffers().take(lengths, CPU)
        assert tuple(each.numel() for each in boxes[:4]) == lengths[:4]
        boxes.outbox.fill_(1), boxes.inbox.fill_(2), boxes.gathered.fill_(3)
        assert set(boxes.outbox.tolist()) == {1} and set(boxes.inbox.tolist()) == {2}
        assert boxes.own.data_ptr() == boxes.gathered.data_ptr() + lengths.place


def test_calls_in_turn_have_the_same_memory_and_calls_under_way_have_their_own() -> None:
    buffers = Buffers()
    first = buffers.take(SMALL, CPU)
    buffers.give_back(first)
    second, third = buffers.take(SMALL, CPU), buffers.take(SMALL, CPU)
    assert addresses(second) == addresses(first)
    assert not set(addresses(second)) & set(addresses(third))


def test_the_memory_of_a_call_that_failed_is_not_used_again() -> None:
    """What interrupted it may still arrive there."""
    buffers = Buffers()
    failed = buffers.take(SMALL, CPU)
    buffers.give_back(buffers.take(SMALL, CPU))
    assert not set(addresses(failed)) & set(addresses(buffers.take(SMALL, CPU)))


def test_memory_made_in_inference_is_written_outside() -> None:
    buffers = Buffers()
    with torch.inference_mode():
        buffers.give_back(buffers.take(SMALL, CPU))
    buffers.take(SMALL, CPU).own.copy_(torch.ones(512, dtype=torch.uint8))


def test_calls_that_were_under_way_together_all_give_back() -> None:
    buffers = Buffers()
    both = [buffers.take(SMALL, CPU), buffers.take(SMALL, CPU)]
    for boxes in both:
        buffers.give_back(boxes)
    again = [buffers.take(SMALL, CPU), buffers.take(SMALL, CPU)]
    assert sorted(map(addresses, again)) == sorted(map(addresses, both))


def test_what_is_dropped_is_freed_at_once() -> None:
    """Not when the garbage collector comes: training loops call that themselves, rarely."""
    gc.disable()
    try:
        memory = weakref.ref(Buffers().take(SMALL, CPU).home)
        assert memory() is None
    finally:
        gc.enable()


def test_what_is_large_is_not_kept() -> None:
    buffers = Buffers()
    boxes = buffers.take(LARGE, CPU)
    buffers.give_back(boxes)
    assert boxes.home is None and not buffers._free


def test_streams_have_memory_of_their_own_and_captures_none(monkeypatch) -> None:
    stream, is_capturing, empty = [7], [False], torch.empty
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": stream[0]}))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing[0])
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **options: empty(*shape, **options))
    buffers, found = Buffers(), {}
    for turn, (number, captured) in enumerate([(7, False), (8, False), (7, True), (7, False)]):
        stream[0], is_capturing[0] = number, captured
        found[turn] = buffers.take(SMALL, torch.device("cuda", 0))
        buffers.give_back(found[turn])
    assert addresses(found[0]) == addresses(found[3]) and found[2].home is None
    assert not set(addresses(found[0])) & (set(addresses(found[1])) | set(addresses(found[2])))
