"""Quantized all-to-all: the tokens that a mixture of experts sends to the ranks that hold them.

Every pair of ranks exchanges as many rows as the router says, so that no size is known to all ranks; both ends of a
message know its own, and it alone decides whether the message is coded or, being small, exact. What stays on a rank is
copied. Nobody else has to hold the same values, so there is nothing to agree on but the codec.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..codec import Codec
from ..codec.recipes import Legs
from ..comm import links
from ..comm.link import Link
from ..config import Config
from ..observe import messages as announce
from . import agreement
from . import handle as calls
from . import plan as policy
from .algorithms import Steps


def all_to_all(
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    config: Config | None = None,
    async_op: bool = False,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
    legs: Legs | None = None,
) -> Any:
    """Send ``input_splits[r]`` rows of ``x`` [n, ...] to rank r; return ``output_splits[r]`` rows of each rank r.

    As ``torch.distributed.all_to_all_single``: rows arrive in rank order, and without splits every rank gets equally
    many. Messages are coded by the gather leg's codec. ValueError if the splits do not fit.
    """
    group, config = calls.resolve(group, config)
    world, x = group.size(), x.contiguous()
    outs, ins = _splits(output_splits, x, world), _splits(input_splits, x, world)
    if sum(ins) != x.size(0) or len(ins) != world or len(outs) != world:
        raise ValueError(f"all_to_all: splits {ins} and {outs} do not fit {x.size(0)} rows on {world} ranks.")
    kept, awaited = ins[group.rank()], outs[group.rank()]
    if kept != awaited:
        raise ValueError(f"all_to_all: this rank keeps {kept} of its own rows and awaits {awaited} of them.")
    out = x.new_empty((sum(outs), *x.shape[1:]))
    agreement.check(group, config)
    outgoing, incoming = ([part.view(-1) for part in each] for each in (torch.split(x, ins), torch.split(out, outs)))
    leaving = [part for rank, part in enumerate(outgoing) if rank != group.rank()]
    exact_bytes = sum(part.nbytes for part in leaving)
    if world == 1 or x.dtype not in policy.DTYPES:
        reason = "one rank" if world == 1 else f"dtype {str(x.dtype).removeprefix('torch.')}"
        announce.deferred(reason, exact_bytes, config)
        return calls.exact(out, dist.all_to_all_single(out, x, outs, ins, group=group, async_op=async_op), async_op)
    wire = links.wire(group, x.device, config)
    codec_of = partial(policy.message_codec, world=world, config=config, legs=legs or config.legs, wire=wire)
    link = calls.link("all_to_all", ["*", *x.shape[1:]], x, group, config)
    wire_bytes = sum(codec_of(part).wire_bytes(part.numel()) for part in leaving)
    return calls.run(steps(out, outgoing, incoming, link, codec_of), exact_bytes, wire_bytes, async_op)


def steps(
    out: Tensor, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], link: Link, codec_of: Callable[[Tensor], Codec]
) -> Steps:
    """Send ``outgoing[r]`` to rank r and fill ``incoming[r]``, a view of ``out``, from it; 1-D, of any length."""
    nothing = out.new_empty(0, dtype=torch.uint8)
    outbox = [nothing if r == link.rank else codec_of(part).encode(part) for r, part in enumerate(outgoing)]
    codecs = [codec_of(part) for part in incoming]
    sizes = [0 if r == link.rank else codecs[r].wire_bytes(part.numel()) for r, part in enumerate(incoming)]
    inbox = [nothing.new_empty(size) for size in sizes]
    incoming[link.rank].copy_(outgoing[link.rank])
    yield link.exchange(outbox, inbox)
    for codec, payload, part in zip(codecs, inbox, incoming, strict=True):
        if payload.numel():
            codec.decode_sum([payload], part)
    return out


def _splits(given: Sequence[int] | None, x: Tensor, world: int) -> list[int]:
    if given is not None:
        return list(given)
    if x.size(0) % world:
        raise ValueError(f"all_to_all: first dimension of {list(x.shape)} is not a multiple of {world} ranks.")
    return [x.size(0) // world] * world
