"""Where compression starts to pay: speed-up by message size and width, by prompt length and GPUs, by nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .cost import Codec, Message, seconds
from .hardware import Link
from .inference import Job, infer
from .nodes import Cluster, ways

SIZES = tuple(2**power for power in range(14, 31))  # 16 KiB to 1 GiB
SEQUENCES = tuple(2**power for power in range(5, 15))
WORLDS = (2, 4, 8)


class Line(NamedTuple):
    """Speed-ups over exact, one for each x."""

    name: str
    x: Sequence[float]
    y: list[float]

    @property
    def pays_from(self) -> float | None:
        """The least x from which on all are faster; None where that never begins."""
        slow = [i for i, gain in enumerate(self.y) if gain <= 1]
        first = slow[-1] + 1 if slow else 0
        return self.x[first] if first < len(self.x) else None


def by_size(link: Link, world: int, codecs: Iterable[Codec], sizes: Sequence[int] = SIZES) -> list[Line]:
    """All-reduce, a line for each codec."""
    return [
        Line(f"{codec.config.bits} bits", sizes, [_gain(link, world, codec, size) for size in sizes])
        for codec in codecs
    ]


def _gain(link: Link, world: int, codec: Codec, nbytes: int) -> float:
    message = Message("all_reduce", nbytes // 2, world)
    return seconds(link, message, None) / seconds(link, message, codec)


def by_sequence(job: Job, codec: Codec, sequences: Sequence[int] = SEQUENCES) -> list[Line]:
    """Time to first token, a line for each number of GPUs."""
    lines = []
    for tp in WORLDS:
        jobs = [job._replace(tp=tp, seq=seq) for seq in sequences]
        lines.append(Line(f"TP{tp}", sequences, [infer(each, None).ttft / infer(each, codec).ttft for each in jobs]))
    return lines


def doublings(most: int) -> list[int]:
    """1, 2, 4 ... up to ``most``, which ends it."""
    counts = []
    count = 1
    while count < most:
        counts.append(count)
        count *= 2
    return [*counts, most]


def by_nodes(cluster: Cluster, numel: int, codec: Codec) -> list[Line]:
    """Seconds of one all-reduce from 2 to ``cluster.nodes`` nodes, a line for each way."""
    counts = doublings(cluster.nodes)[1:]
    found = [ways(cluster._replace(nodes=count), numel, codec) for count in counts]
    return [
        Line(way.name, [count * cluster.gpus for count in counts], [row[i].seconds for row in found])
        for i, way in enumerate(found[0])
    ]


def by_size_across(cluster: Cluster, codec: Codec, sizes: Sequence[int] = SIZES) -> list[Line]:
    """Seconds of one all-reduce over all nodes by message size, a line for each way."""
    found = [ways(cluster, nbytes // 2, codec) for nbytes in sizes]
    return [Line(way.name, sizes, [row[i].seconds for row in found]) for i, way in enumerate(found[0])]
