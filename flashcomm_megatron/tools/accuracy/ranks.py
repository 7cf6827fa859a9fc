"""Row-parallel sums of simulated ranks: exact, or through the collectives' own algorithms.

:class:`Compressed` runs what real ranks run (comm/simulated.py), so its sums are theirs bit for bit. On the way it
notes, for every site, how much of the sum was lost, and how many bits a value took.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor

from ...codec.published.outlier import from_ranges
from ...codec.recipes import RECIPES, Legs
from ...collectives import ALGORITHMS
from ...collectives.algorithms import Residuals, Steps
from ...collectives.plan import Plan, plan
from ...comm import simulated
from ...comm.communicator import Call
from ...comm.simulated import Simulated
from ...config import Config
from ..calibrate import GAMMA

CALL = Call(0, "simulated", 0, 0.0)
Ranges = dict[str, Tensor]  # site -> float32 [2, ranks, features]: minima, maxima


def exact(site: str, parts: list[Tensor]) -> Tensor:
    """The sum in rank order, float32."""
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class Recorder:
    """Exact sums that note what the partial sums range over, as calibrate.py does for recipe ``outlier``."""

    def __init__(self) -> None:
        self.ranges: Ranges = {}

    def __call__(self, site: str, parts: list[Tensor]) -> Tensor:
        rows = torch.stack(parts).flatten(1, -2)
        batch = torch.stack([rows.amin(1), rows.amax(1)])
        self.ranges[site] = self.ranges[site].lerp(batch, GAMMA) if site in self.ranges else batch
        return exact(site, parts)


class Compressed:
    """Sums of ``world`` simulated ranks under ``config``.

    ``sites`` are the sites to compress, all if None. ``ranges`` serve recipes that are calibrated. ``codecs`` stand in
    for the configuration's own (baselines.py). ``layers``: of the model, whose last sum may have a width of its own.
    """

    def __init__(
        self,
        config: Config,
        world: int,
        ranges: Ranges,
        has_feedback: bool = True,
        sites: Collection[str] | None = None,
        codecs: Legs | None = None,
        layers: int = 0,
    ) -> None:
        self.config, self.world, self.ranges, self.sites = config, world, ranges, sites
        self.codecs, self.last, self.last_bits = codecs, f"layers.{layers - 1}.mlp.", config.last_sum(layers)
        self.has_feedback = has_feedback and RECIPES[config.recipe].feedback
        self.lost: dict[str, float] = defaultdict(float)
        self.sent: dict[str, float] = defaultdict(float)
        self.bits, self.values = 0.0, 0
        self.legs: dict[str, list[Legs]] = {}
        self.begin()

    def begin(self) -> None:
        """A new forward pass: what the roundings of the last one lost is forgotten."""
        self.memory: list[Residuals | None] = [Residuals() if self.has_feedback else None for _ in range(self.world)]

    def __call__(self, site: str, parts: list[Tensor]) -> Tensor:
        wanted = exact(site, parts)
        if self.world == 1 or (self.sites is not None and site not in self.sites):
            return wanted
        parts = [part.contiguous() for part in parts]

        def start(comm: Simulated) -> Steps:
            x = parts[comm.rank]
            made = self._plan(site, comm, x)
            return ALGORITHMS[made.algorithm](x, x, made, CALL, self.memory[comm.rank])

        found = simulated.first(start, self.world)
        self.lost[site] += (found - wanted).double().square().sum().item()
        self.sent[site] += wanted.double().square().sum().item()
        self.bits += 8 * payload_bytes(self._plan(site, Simulated(0, self.world), parts[0]))
        self.values += wanted.numel()
        return found

    @property
    def bits_per_value(self) -> float:
        """Bits on the wire of one value, all included: 16 is what an uncompressed bfloat16 ring would send."""
        return self.bits / self.values if self.values else 0.0

    def _plan(self, site: str, comm: Simulated, x: Tensor) -> Plan:
        legs = self.codecs
        if RECIPES[self.config.recipe].calibrated:
            if site not in self.legs:
                low, high = self.ranges[site]
                self.legs[site] = [
                    self.config.legs._replace(reduce=from_ranges(low, high, each)) for each in range(self.world)
                ]
            legs = self.legs[site][comm.rank]
        elif legs is None and site.startswith(self.last):
            legs = self.config.legs_of(self.last_bits)
        return plan("all_reduce", x.shape, x.dtype, x.device, comm, self.config, legs=legs)


def payload_bytes(plan: Plan) -> float:
    """Bytes for the values of an all-reduce, so counted that equal numbers are equal bytes from each rank.

    Of two-step the mean of both legs, of one-step, which sends ``world / 2`` times as many values, all it sends.
    """
    world, total = plan.comm.world, 0.0
    for piece in plan.pieces:
        sizes = [piece.slices.size(rank) for rank in range(piece.slices.world)]
        if plan.algorithm == "one-step":
            total += piece.sizes[0] * world / 2
        else:
            width = piece.slices.width
            total += sum(leg.wire_bytes(size, width) for leg in (plan.reduce, plan.gather) for size in sizes) / 2
    return total
