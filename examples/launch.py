"""Start and stop the ranks of an example: torchrun's processes, or this one alone, as one tensor-parallel group."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from flashcomm_megatron import cpu

# Megatron warns of what it would like to have installed, torch of the names Megatron uses.
warnings.filterwarnings("ignore", category=UserWarning)
warnings.filterwarnings("ignore", category=FutureWarning)


class Ranks(NamedTuple):
    """This process among the others."""

    rank: int
    world: int
    device: torch.device


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(seed: int = 1234) -> Ranks:
    """Join the process group (NCCL with GPUs, gloo without) and make all ranks one tensor-parallel group."""
    on_cpu = cpu.enable()
    from megatron.core import parallel_state, tensor_parallel

    device = torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if not on_cpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("gloo" if on_cpu else "nccl", **alone)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def stop() -> None:
    """Leave the process group."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def refuse(sentence: str) -> NoReturn:
    """End with exit code 2, before ranks wait for each other: one rank of a machine says why, torchrun repeats it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr, flush=True)
    else:
        time.sleep(10)  # torchrun ends every rank when one ends; let that be the one that speaks
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        Path(report).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}))
    sys.exit(2)
