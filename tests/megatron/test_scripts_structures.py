"""The unmodified pretrain_gpt.py with every structure that runs without a GPU, exactly and with 8-bit sums.

A script that runs without the flag runs with it, and its losses are nearly the same. Needs a checkout of Megatron-LM
(see megatron_lm.py). Not here: Mamba hybrids, which need mamba_ssm's kernels.
"""

from __future__ import annotations

import re

import pytest
from megatron_lm import run, try_scripts

pytestmark = pytest.mark.slow

EXPERTS = ["--sequence-parallel", "--disable-bias-linear", "--num-experts", "4", "--moe-router-topk", "2",
           "--moe-token-dispatcher-type"]  # fmt: skip
SHARED = [*EXPERTS, "alltoall", "--moe-shared-expert-intermediate-size", "32"]
LATENT = ["--multi-latent-attention", "--q-lora-rank", "24", "--kv-lora-rank", "16", "--qk-head-dim", "16",
          "--qk-pos-emb-head-dim", "8", "--v-head-dim", "16", "--rotary-scaling-factor", "1", "--rope-type", "rope",
          "--position-embedding-type", "rope"]  # fmt: skip
# name: (options, what stays exact and is counted)
STRUCTURES: dict[str, tuple[list[str], str | None]] = {
    "dense": ([], None),
    "experts, allgather": ([*EXPERTS, "allgather"], None),
    "experts, alltoall": ([*EXPERTS, "alltoall"], None),
    "expert parallelism": ([*EXPERTS, "alltoall", "--expert-model-parallel-size", "2",
                            "--expert-tensor-parallel-size", "1"], None),
    "shared experts": (SHARED, None),
    "shared experts with overlap": ([*SHARED, "--moe-shared-expert-overlap"], None),
    "Torch FSDP2": (["--use-torch-fsdp2", "--untie-embeddings-and-output-weights", "--ckpt-format", "torch_dist"],
                    None),
    "latent attention": (LATENT, "latent attention's last dimension"),
    "token prediction": (["--mtp-num-layers", "1", "--position-embedding-type", "rope"],
                         "token prediction's last dimension"),
}  # fmt: skip


def losses(output: str) -> list[float]:
    """Of every iteration and every evaluation."""
    return [float(loss) for loss in re.findall(r"lm loss(?: value)?: (\S+)", output)]


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_runs_without_the_flag_runs_with_it(name: str) -> None:
    options, stays_exact = STRUCTURES[name]
    flags = [*try_scripts.EIGHT_BITS, *(["--flash-comm-strict"] if stays_exact is None else [])]
    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"} if "FSDP2" in name else {}  # Megatron insists on more than one
    exact = run("pretrain_gpt.py", *try_scripts.TRAIN, *options, **variables)
    assert exact.returncode == 0, exact.stderr[-3000:]
    eight = run("pretrain_gpt.py", *try_scripts.TRAIN, *options, *flags, **variables)
    assert eight.returncode == 0, eight.stderr[-3000:]
    assert len(losses(exact.stdout)) == 10 and losses(eight.stdout) == pytest.approx(losses(exact.stdout), rel=2e-3)
    said = eight.stdout + eight.stderr  # Megatron sets up logging, from 0.19 on to stderr
    compressed, calls = re.findall(r"flash-comm: compressed (\d+) of (\d+) collectives", said)[0]
    assert int(compressed) > 0 and (compressed == calls) == (stays_exact is None)
    if stays_exact is not None:
        assert f"a collective stays exact: {stays_exact}" in said
