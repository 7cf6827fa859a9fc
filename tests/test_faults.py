"""Whatever one rank does wrong, the others end in time with an error that names it and the call: tests/faults.py."""

from __future__ import annotations

import os

import faults
import pytest
from ranks import spawn

from flashcomm_megatron import extension
from flashcomm_megatron.transport import segment

pytestmark = pytest.mark.skipif(extension.module() is None, reason="the extension is not built")


@pytest.mark.parametrize("transport", faults.TRANSPORTS)
def test_a_rank_that_does_something_else(transport: str) -> None:
    heard = spawn(faults.alive, 3, transport)
    for fault in faults.LIVES:
        texts = [each[fault.name].text for each in heard]
        survivors = [text for rank, text in enumerate(texts) if rank != faults.VICTIM]
        assert all(survivors), f"{fault.name}: {texts}"
        told = fault.told[faults.TRANSPORTS.index(transport)]
        assert any(told in text for text in survivors), f"{fault.name}: {texts}"


@pytest.mark.parametrize("transport", faults.TRANSPORTS)
def test_a_rank_whose_process_ends(transport: str) -> None:
    world = 2 * len(faults.ENDS)
    heard = spawn(faults.ending, world, transport, lost=range(1, world, 2))
    for i, fault in enumerate(faults.ENDS):
        told = fault.told[faults.TRANSPORTS.index(transport)].format(victim=2 * i + 1)
        assert told in heard[2 * i].text, f"{fault.name}: {heard[2 * i].text}"
    assert not list(segment.FOLDER.glob(f"flash-comm-{os.getpid()}-*"))
