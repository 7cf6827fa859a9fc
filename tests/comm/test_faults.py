"""Whatever one rank does wrong, the others end in time with an error that names it and the call."""

from __future__ import annotations

import os
from types import SimpleNamespace

import faults
import pytest
import torch
from ranks import spawn
from specification import planned

from flashcomm_megatron.codec import native as extension
from flashcomm_megatron.collectives.handle import finish
from flashcomm_megatron.comm import shared_memory
from flashcomm_megatron.comm.progress import Progress
from flashcomm_megatron.config import Config
from flashcomm_megatron.megatron import context as where

pytestmark = pytest.mark.skipif(extension.module() is None, reason="the extension is not built")


@pytest.mark.parametrize("transport", faults.TRANSPORTS)
def test_a_rank_that_does_something_else_is_named(transport: str) -> None:
    heard = spawn(faults.alive, 3, transport)
    for fault in faults.LIVES:
        found = [each[fault.name] for each in heard]
        survivors = [each for rank, each in enumerate(found) if rank != faults.VICTIM]
        assert all(each.text for each in survivors), f"{fault.name}: {found}"
        told = fault.told[faults.TRANSPORTS.index(transport)]
        assert any(told in each.text + each.warned for each in found), f"{fault.name}: {found}"
        if told.startswith((faults.MADE, faults.GIVEN_UP)):
            assert min(each.seconds for each in found) < faults.WAIT, f"{fault.name}: {found}"  # not the timeout


@pytest.mark.parametrize("transport", faults.TRANSPORTS)
def test_a_rank_whose_process_ends_is_named(transport: str) -> None:
    world = 2 * len(faults.ENDS)
    heard = spawn(faults.ending, world, transport, lost=range(1, world, 2))
    for i, fault in enumerate(faults.ENDS):
        told = fault.told[faults.TRANSPORTS.index(transport)].format(victim=2 * i + 1)
        assert told in heard[2 * i].text, f"{fault.name}: {heard[2 * i].text}"
    assert not list(shared_memory.FOLDER.glob(f"flash-comm-{os.getpid()}-*"))


class Broken:
    """A message that does not arrive."""

    def wait(self) -> None:
        raise RuntimeError("flash-comm: #7/beaf all_reduce [8] float32: rank 1 has given up.")


class Model(torch.nn.Module):
    """Communicates in the layer named first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(1, 1)

    def forward(self, inside: bool) -> None:
        def steps():  # as an algorithm of algorithms.py
            yield Broken()

        x, config = torch.ones(8), Config(bits=4, min_bytes=0)
        plan = planned("all_reduce", x, 2, config)
        plan = plan._replace(comm=SimpleNamespace(progress=Progress()))
        finish(steps(), x, plan, where.Site("row", self.first, config) if inside else None)


def test_an_error_inside_a_layer_names_it() -> None:
    with pytest.raises(RuntimeError, match=r"#7/beaf .*rank 1 has given up\. \(This rank was in first\.\)$"):
        Model()(True)
    with pytest.raises(RuntimeError, match=r"given up\.$"):
        Model()(False)
