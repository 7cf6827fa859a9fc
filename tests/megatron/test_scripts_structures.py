"""The unmodified pretrain_gpt.py with every structure that runs without a GPU, exactly and with 8-bit sums.

A script that runs without the flag runs with it, and its losses are nearly the same. Needs a checkout of Megatron-LM
(see megatron_lm.py). Mamba hybrids, pretrain_hybrid.py, need kernels for GPUs: they run on stand-ins that compute the
same in torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_lm import ROOT, checkout, run, try_scripts
from patience import patient

pytestmark = pytest.mark.slow

EXPERTS = ["--sequence-parallel", "--disable-bias-linear", "--num-experts", "4", "--moe-router-topk", "2",
           "--moe-token-dispatcher-type"]  # fmt: skip
SHARED = [*EXPERTS, "alltoall", "--moe-shared-expert-intermediate-size", "32"]
LATENT = ["--multi-latent-attention", "--q-lora-rank", "24", "--kv-lora-rank", "16", "--qk-head-dim", "16",
          "--qk-pos-emb-head-dim", "8", "--v-head-dim", "16", "--rotary-scaling-factor", "1", "--rope-type", "rope",
          "--position-embedding-type", "rope"]  # fmt: skip
HYBRID = ["--spec", "hybrid_spec", "hybrid_stack_spec", "--hybrid-layer-pattern", "M-M*-", "--mamba-num-heads", "4",
          "--mamba-head-dim", "32", "--mamba-state-dim", "16", "--mamba-num-groups", "2",
          "--disable-bias-linear"]  # fmt: skip
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
    "Mamba hybrid": (HYBRID, None),
}  # fmt: skip


def losses(output: str) -> list[float]:
    """Of every iteration and every evaluation."""
    return [float(loss) for loss in re.findall(r"lm loss(?: value)?: (\S+)", output)]


def script_of(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The script that runs a structure; a hybrid's modules can then be imported."""
    if name != "Mamba hybrid":
        return "pretrain_gpt.py"
    if not (checkout() / "pretrain_hybrid.py").exists():
        pytest.skip("this Megatron-LM has no pretrain_hybrid.py")
    support = ROOT / "tests" / "support"
    folders = [support, support / "stand_ins" / "transformer_engine", support / "stand_ins" / "mamba"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    return "pretrain_hybrid.py"


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_runs_without_the_flag_runs_with_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, stays_exact = STRUCTURES[name]
    script = script_of(name, monkeypatch)
    flags = [*try_scripts.EIGHT_BITS, *(["--flash-comm-strict"] if stays_exact is None else [])]
    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"} if "FSDP2" in name else {}  # Megatron insists on more than one
    exact = run(script, *try_scripts.TRAIN, *options, **variables)
    assert exact.returncode == 0, exact.stderr[-3000:]
    eight = run(script, *try_scripts.TRAIN, *options, *flags, **variables)
    assert eight.returncode == 0, eight.stderr[-3000:]
    assert len(losses(exact.stdout)) == 10 and losses(eight.stdout) == pytest.approx(losses(exact.stdout), rel=2e-3)
    said = eight.stdout + eight.stderr  # Megatron sets up logging, from 0.19 on to stderr
    compressed, calls = re.findall(r"flash-comm: compressed (\d+) of (\d+) collectives", said)[0]
    assert int(compressed) > 0 and (compressed == calls) == (stays_exact is None)
    if stays_exact is not None:
        assert f"a collective stays exact: {stays_exact}" in said


def test_a_whole_script_from_a_yaml_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its losses are those of the same options on the command line, and strict finds every sum compressed."""
    script, path = script_of("Mamba hybrid", monkeypatch), str(tmp_path / "run.yaml")
    options = ["--tensor-model-parallel-size", "2", *try_scripts.TRAIN, *HYBRID]
    eight = run(script, *try_scripts.TRAIN, *HYBRID, *try_scripts.EIGHT_BITS)
    line = [sys.executable, "-m", "flashcomm_megatron", "--cpu", str(ROOT / "tests/support/yaml_of_options.py")]
    surroundings = try_scripts.environment(checkout()) | {"WORLD_SIZE": "2"}
    subprocess.run([*line, *options, path], cwd=checkout(), env=surroundings, check=True, timeout=patient(120))
    with open(path, "a") as file:
        file.write("flash_comm_bits: 8\nflash_comm_min_bytes: 0\nflash_comm_strict: true\n")
    from_file = run(script, "--yaml-cfg", path)
    assert from_file.returncode == 0, from_file.stderr[-3000:]
    assert "flash-comm: 8-bit auto" in from_file.stdout + from_file.stderr
    assert len(losses(eight.stdout)) == 10 and losses(from_file.stdout) == losses(eight.stdout)
