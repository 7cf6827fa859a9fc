"""What a row of an all-reduce keeps when the rows beside it change: nothing may reach it.

run:  python benchmarks/rows_table.py        (simulated ranks, seconds; writes benchmarks/results/rows.json)

Row 0 of a bfloat16 tensor of 8 rows stays, the others are replaced, or there are fewer. For every recipe, number of
ranks and row length: how many values of row 0 changed a bit, its relative error and its NaNs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor

from flashcomm_megatron.collectives import ALGORITHMS, plan
from flashcomm_megatron.comm import simulated
from flashcomm_megatron.comm.communicator import Call
from flashcomm_megatron.comm.simulated import Simulated
from flashcomm_megatron.config import Config

WIDTHS = (64, 80, 96, 100, 576, 960, 2112, 2880, 3584, 4096, 5120)
RECIPES = ("auto", "flash-v1", "flash-v2", "mx")
WORLDS = (2, 4, 8)
ROWS = 8


def replaced(x: Tensor, scale: float) -> Tensor:
    """Row 0 as it is, other rows of new values times ``scale``."""
    return torch.cat([x[:1], scale * torch.randn(ROWS - 1, x.size(1)).bfloat16()])


NEIGHBOURS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: replaced(x, 1.0),
    "x 1e4": lambda x: replaced(x, 1e4),
    "x 1e6": lambda x: replaced(x, 1e6),
    "NaN": lambda x: replaced(x, float("nan")),
    "none": lambda x: x[:1],
    "two": lambda x: x[:3],
}


def summed(parts: list[Tensor], config: Config) -> Tensor:
    """Row 0 of the all-reduce of ``parts``."""

    def start(comm: Simulated) -> Any:
        x = parts[comm.rank].clone()
        made = plan.plan("all_reduce", x.shape, x.dtype, x.device, comm, config)
        return ALGORITHMS[made.algorithm](x, x, made, Call(1, "rows", 0, 1.0))

    return simulated.first(start, len(parts))[0]


def row_of(recipe: str, world: int, width: int) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    config, parts = (
        Config(bits=4, recipe=recipe, min_bytes=0),
        [torch.randn(ROWS, width).bfloat16() for _ in range(world)],
    )
    before = summed(parts, config)
    exact = torch.stack([part[0].float() for part in parts]).sum(0)
    found: dict[str, Any] = {"recipe": recipe, "ranks": world, "row": width}
    for name, change in NEIGHBOURS.items():
        after = summed([change(part) for part in parts], config)
        changed = int((after.view(torch.int16) != before.view(torch.int16)).sum())
        error = ((after.float() - exact).norm() / exact.norm()).item()
        said = "same bits" if not changed else f"{changed} change, error {error:.2g}, {int(after.isnan().sum())} NaN"
        found[name] = said
    return found


def main() -> None:
    rows = [row_of(recipe, world, width) for recipe in RECIPES for world in WORLDS for width in WIDTHS]
    same = sum(row[name] == "same bits" for row in rows for name in NEIGHBOURS)
    for row in rows:
        if any(row[name] != "same bits" for name in NEIGHBOURS):
            print(row)
    print(f"{same} of {len(rows) * len(NEIGHBOURS)} cases: row 0 has the same bits")
    record.save("rows", rows)


if __name__ == "__main__":
    main()
