"""``calibrate``: run a few batches of any script and write what recipe outlier needs to know about its model.

    torchrun --nproc-per-node 8 -m flashcomm_megatron calibrate pretrain_gpt.py ... --out ranges.safetensors

The script runs unchanged and uncompressed. At every row-parallel layer each rank keeps, for each feature of its partial
sum, a moving average of the batches' minima and of their maxima (Dong et al., arXiv 2411.07942)::

    min <- (1 - gamma) * min + gamma * min of the batch        gamma = 0.01; the first batch is the start

One call of a layer is one batch. After ``--batches`` of them the ranks put their averages together, rank 0 writes the
file (ranges.py), and the script is ended. The text should resemble the traffic to come, since what goes beyond the
ranges is cut off; decoding one token at a time counts as batches too, so give prompts rather than generation.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..codec.published import ranges
from ..config import Config, is_disabled, set_current
from ..megatron import context, coverage, installation, model
from ..megatron.patching import PatchError

GAMMA = 0.01
BATCHES = 32


class Done(SystemExit):
    """Ends the script: the file is written, or one sentence says why it cannot be."""


def _refused(sentence: object) -> Done:
    return Done(f"flashcomm_megatron calibrate: error: {sentence}")


class Recorder:
    """Averages the ranges of every layer over ``batches`` calls, then writes them to ``path`` and ends the script."""

    def __init__(self, path: str, batches: int) -> None:
        self.path, self.batches = path, batches
        self.names: dict[nn.Module, str] = {}
        self.ranges: dict[str, Tensor] = {}  # float32 [2, features]: minima, maxima
        self.calls: dict[str, int] = {}
        self.group: Any = None
        self.finished = False

    @torch.no_grad()
    def __call__(self, layer: nn.Module, x: Tensor, group: Any) -> None:
        """Note one partial sum ``x`` [..., features] of ``layer``."""
        if layer not in self.names:
            self._start(layer, group)
        name = self.names[layer]
        calls = self.calls.get(name, 0)
        if calls == self.batches:  # so every layer had as many: all ranks are here, before the same collective
            self.finish()
            raise Done(0)
        rows = x.detach().reshape(-1, x.size(-1)).float()
        batch = torch.stack([rows.amin(0), rows.amax(0)])
        self.ranges[name] = self.ranges[name].lerp(batch, GAMMA) if calls else batch
        self.calls[name] = calls + 1

    def finish(self) -> None:
        """Put all ranks' ranges together and write them, on rank 0."""
        layers = {}  # float32 [2, ranks, features]
        for name in sorted(self.ranges):
            everyone = [torch.empty_like(self.ranges[name]) for _ in range(self.group.size())]
            dist.all_gather(everyone, self.ranges[name].contiguous(), group=self.group)
            layers[name] = torch.stack(everyone, dim=1).cpu()
        try:
            ranges.check_finite(layers)
        except ValueError as error:  # on every rank alike
            raise _refused(error) from error
        if dist.get_rank() == 0:
            batches = min(self.calls.values())
            ranges.save(self.path, layers, batches)
            print(f"flash-comm: {len(layers)} layers over {batches} batches written to {self.path}", flush=True)
        dist.barrier(group=self.group)  # so no rank ends, and takes the others down, before the file is there
        self.finished = True

    def _start(self, layer: nn.Module, group: Any) -> None:
        from megatron.core import parallel_state

        coverage.stop()  # nothing is compressed, on purpose
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        if stages > 1:
            raise _refused(f"the model has to be in one pipeline stage, found {stages}.")
        self.group = group
        self.names = {each: name for name, each in model.row_layers(layer).items()}


def main(argv: list[str]) -> int:
    """Run ``calibrate SCRIPT ... --out FILE``; exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcomm_megatron calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="Where to write the ranges.")
    parser.add_argument("--batches", type=int, default=BATCHES, metavar="N", help="Calls of each layer to look at.")
    options, command = parser.parse_known_args(argv)
    if problem := _problem(options, command):
        parser.exit(2, f"{parser.prog}: error: {problem}\n")
    recorder = Recorder(options.out, options.batches)
    try:
        set_current(Config(bits=8))  # a site needs one; whatever it says, an observed collective is exact
        installation.install()
        context.observe(recorder)
        sys.argv, sys.path[0] = command, os.path.dirname(os.path.abspath(command[0]))
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        _end(recorder)
    except PatchError as error:
        raise _refused(error) from error
    finally:
        context.observe(None)
        coverage.stop()
    return 0


def _problem(options: argparse.Namespace, command: list[str]) -> str | None:
    folder = os.path.dirname(os.path.abspath(options.out))
    if not command or not os.path.isfile(command[0]):
        return f"{command[0] if command else 'no script'}: no such file. Give the path of the script to run."
    if not os.path.isdir(folder):
        return f"--out {options.out}: there is no folder {folder}."
    if options.batches < 1:
        return f"--batches {options.batches}: choose 1 or more."
    if is_disabled():
        return "FLASH_COMM_DISABLE is set, so no layer can be observed. Unset it."
    return None


def _end(recorder: Recorder) -> None:
    """Write the file if the script ended by itself before all batches were seen."""
    if not recorder.ranges:
        raise _refused("the script ran no tensor-parallel row layer. Add --transformer-impl local.")
    if recorder.finished:
        return
    if not dist.is_initialized():
        seen = min(recorder.calls.values())
        raise _refused(f"the script closed its process group after {seen} batches. Add --batches {seen - 1}.")
    recorder.finish()
