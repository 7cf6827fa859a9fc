"""Many nodes: what one all-reduce over all their GPUs costs, exact, compressed flat and compressed hierarchically.

- *exact*: NCCL's rings or trees. Rings share the network cards, so each carries 1 / (GPUs a node) of the data.
- *flat*: two-step over all ranks. Each card carries almost all of its GPU's payload: a node's GPUs send the same slices
  side by side, unsummed.
- *hierarchical*: reduce-scatter inside the node, compressed all-reduce of 1 / (GPUs a node) between the nodes,
  all-gather inside; inside either exact or compressed as well.

All projections. Assumed: one network card a GPU, a network without contention, no overlap.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from ...comm.workspace import REGION_BYTES
from .cost import Codec, Message, plan_of, seconds, wire_bytes
from .hardware import GB, US, Link

NET_EFFICIENCY = 0.96  # NCCL src/graph/topo.h, NET_BW: 12 GB/s of 100 Gbit/s
NET_LATENCY = 9.6 * US  # NCCL src/graph/tuning.cc, hwLat of NET, ring, simple protocol: each step
MESSAGE = 1 * US  # assumed: a rank posts one message
TREE_EFFICIENCY = 0.9  # NCCL src/graph/tuning.cc: trees reach 0.9 of the rings' rate
INBOXES = 4  # two parities of two legs: csrc/cuda/protocol.h


class Cluster(NamedTuple):
    """``nodes`` nodes of ``gpus`` GPUs."""

    nodes: int
    gpus: int
    inside: Link
    card: float  # bytes per second of each GPU's network card

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    @property
    def between(self) -> Link:
        return Link(self.card, "--rate", 0.0, "NCCL", step=NET_LATENCY, message=MESSAGE)


class Way(NamedTuple):
    """One way to do it. ``card_bytes``: sent through each network card; ``workspace``: bytes of buffers on a GPU."""

    name: str
    seconds: float
    card_bytes: float
    workspace: float


def card_rate(gbits: float) -> float:
    """Bytes per second that transfers reach over a card of ``gbits`` Gbit/s."""
    return gbits / 8 * GB * NET_EFFICIENCY


def ways(cluster: Cluster, numel: int, codec: Codec) -> list[Way]:
    """All ways for a bf16 tensor of ``numel`` values, exact first. On one node flat and hierarchical are the same.

    ``codec`` should compress whatever its size (``min_bytes=0``), or the compressed ways are none.
    """
    if cluster.nodes == 1:
        message = Message("all_reduce", numel, cluster.gpus)
        exact, flat = seconds(cluster.inside, message, None), seconds(cluster.inside, message, codec)
        return [Way("exact", exact, 0, 0), Way("flat", flat, 0, group_workspace(message, codec))]
    inside = (("hierarchical, exact inside", None), ("hierarchical, compressed inside", codec))
    return [
        _exact(cluster, numel),
        _flat(cluster, numel, codec),
        *(_hierarchical(name, cluster, numel, codec, inner) for name, inner in inside),
    ]


def _exact(cluster: Cluster, numel: int) -> Way:
    nbytes, nodes = 2 * numel, cluster.nodes
    bus = min(cluster.inside.send_rate(cluster.gpus), cluster.gpus * cluster.card)
    sent = 2 * (cluster.world - 1) / cluster.world * nbytes
    ring = 2 * (nodes - 1) * NET_LATENCY + sent / bus
    tree = 2 * math.log2(nodes) * NET_LATENCY + 2 * nbytes / (TREE_EFFICIENCY * bus)
    return Way("exact", cluster.inside.latency + min(ring, tree), sent / cluster.gpus, 0)


def _flat(cluster: Cluster, numel: int, codec: Codec) -> Way:
    message = Message("all_reduce", numel, cluster.world)
    sent = wire_bytes(message, plan_of(message, codec))
    outside = sent * (cluster.world - cluster.gpus) / (cluster.world - 1)
    free = replace(cluster.between, rate=math.inf)
    wire = max(outside / cluster.card, (sent - outside) / cluster.inside.send_rate(cluster.gpus))
    return Way("flat", seconds(free, message, codec) + wire, outside, group_workspace(message, codec))


def _hierarchical(name: str, cluster: Cluster, numel: int, codec: Codec, inner: Codec | None) -> Way:
    part = numel // cluster.gpus
    across = Message("all_reduce", part, cluster.nodes)
    total = seconds(cluster.between, across, codec)
    if cluster.gpus > 1:
        total += seconds(cluster.inside, Message("reduce_scatter", numel, cluster.gpus), inner)
        total += seconds(cluster.inside, Message("all_gather", part, cluster.gpus), inner)
    return Way(name, total, wire_bytes(across, plan_of(across, codec)), group_workspace(across, codec) + 2 * part)


# ---- workspaces ----------------------------------------------------------------------------------------------------


def group_workspace(message: Message, codec: Codec) -> float:
    """Bytes of outboxes and inboxes of one all-reduce over the process group, the larger leg of the two."""
    plan = plan_of(message, codec)
    if plan.algorithm == "one-step":
        return message.world * plan.reduce.wire_bytes(message.numel)
    part = math.ceil(message.numel / message.world)
    reduce, gather = plan.reduce.wire_bytes(part), plan.gather.wire_bytes(part)
    return max((2 * message.world - 1) * reduce, message.world * gather)


def fused_workspace(world: int) -> int:
    """Bytes of a GPU's inboxes in a fused kernel's workspace (transport/workspace.py), whatever the message."""
    return INBOXES * world * REGION_BYTES
