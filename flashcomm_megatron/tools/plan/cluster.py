"""One all-reduce over all GPUs of several nodes: exact, compressed flat, compressed hierarchically.

- *exact*: NCCL's rings or trees. Rings share the network cards, so each carries 1 / (GPUs a node) of the data.
- *flat*: two-step over all ranks. Each card carries almost all of its GPU's payload: a node's GPUs send the same slices
  side by side, unsummed.
- *hierarchical*: reduce-scatter inside the node, compressed all-reduce of 1 / (GPUs a node) between the nodes,
  all-gather inside; inside either exact or compressed as well.

Assumed: one network card a GPU, a network without contention, no overlap.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from .cost import BYTES, Collective, Compression, seconds, sent_bytes, value_bytes
from .hardware import GB, US, Link

NET_EFFICIENCY = 0.96  # NCCL src/graph/topo.h, NET_BW: 12 GB/s of 100 Gbit/s
NET_LATENCY = 9.6 * US  # NCCL src/graph/tuning.cc, hwLat of NET, ring, simple protocol: each step
MESSAGE = 1 * US  # assumed: a rank posts one message
TREE_EFFICIENCY = 0.9  # NCCL src/graph/tuning.cc: trees reach 0.9 of the rings' rate
FUSED_INBOXES = 16 << 20  # bytes for each GPU of the node in a fused kernel's memory, whatever the tensor


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


def ways(cluster: Cluster, numel: int, compression: Compression) -> list[Way]:
    """All ways for ``numel`` values, exact first. On one node flat and hierarchical are the same.

    ``compression`` should compress whatever its size (``min_bytes=0``).
    """
    if cluster.nodes == 1:
        whole = Collective("all_reduce", numel, cluster.gpus)
        flat = Way("flat", seconds(cluster.inside, whole, compression), 0, workspace(whole, compression))
        return [Way("exact", seconds(cluster.inside, whole, None), 0, 0), flat]
    return [
        _exact(cluster, numel),
        _flat(cluster, numel, compression),
        _hierarchical("hierarchical, exact inside", cluster, numel, compression, None),
        _hierarchical("hierarchical, compressed inside", cluster, numel, compression, compression),
    ]


def _exact(cluster: Cluster, numel: int) -> Way:
    bus = min(cluster.inside.send_rate(cluster.gpus), cluster.gpus * cluster.card)
    sent = 2 * (cluster.world - 1) / cluster.world * BYTES * numel
    ring = 2 * (cluster.nodes - 1) * NET_LATENCY + sent / bus
    tree = 2 * math.log2(cluster.nodes) * NET_LATENCY + 2 * BYTES * numel / (TREE_EFFICIENCY * bus)
    return Way("exact", cluster.inside.latency + min(ring, tree), sent / cluster.gpus, 0)


def _flat(cluster: Cluster, numel: int, compression: Compression) -> Way:
    whole = Collective("all_reduce", numel, cluster.world)
    sent = sent_bytes(whole, compression)
    outside = sent * (cluster.world - cluster.gpus) / (cluster.world - 1)
    wire = max(outside / cluster.card, (sent - outside) / cluster.inside.send_rate(cluster.gpus))
    without_wire = seconds(replace(cluster.between, rate=math.inf), whole, compression)
    return Way("flat", without_wire + wire, outside, workspace(whole, compression))


def _hierarchical(name: str, cluster: Cluster, numel: int, compression: Compression, inner: Compression | None) -> Way:
    part = numel // cluster.gpus
    across = Collective("all_reduce", part, cluster.nodes)
    total = seconds(cluster.between, across, compression)
    if cluster.gpus > 1:
        total += seconds(cluster.inside, Collective("reduce_scatter", numel, cluster.gpus), inner)
        total += seconds(cluster.inside, Collective("all_gather", part, cluster.gpus), inner)
    return Way(name, total, sent_bytes(across, compression), workspace(across, compression) + BYTES * part)


def workspace(collective: Collective, compression: Compression) -> float:
    """Bytes of outboxes and inboxes of one all-reduce over the process group, the larger leg of the two."""
    reduce, gather = value_bytes(compression.config)
    if compression.one_step(collective):
        return collective.world * collective.numel * reduce
    part = math.ceil(collective.numel / collective.world)
    return max((2 * collective.world - 1) * part * reduce, collective.world * part * gather)
