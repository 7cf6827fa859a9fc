"""Break every invariant once and see its test fail: what the tests are worth.

    python tests/stress/mutations.py [WORD ...]     all mutations, or those whose invariant holds one of the words

Each row of ``MUTATIONS`` changes one place in a copy of the repository and names the tests that must then fail. A
mutation that no test notices is an error of this script's, or of the tests'. The numbers are those of the invariants in
docs/reliability.md. The compiled extension is copied, not built again: what is broken in csrc is built into programs of
sanitized.py, or by emulator.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "flashcomm_megatron"


class Mutation(NamedTuple):
    """``before`` becomes ``after`` in ``file``; ``tests`` (pytest's words) must then fail."""

    invariant: str
    file: str
    before: str
    after: str
    tests: str


MUTATIONS = (
    Mutation(
        "1 ranks agree: a rank's own part passes through the codec too",
        f"{PACKAGE}/algorithms.py",
        "        codec.decode_sum([received], part)",
        "        part.copy_(mine) if received is payload else codec.decode_sum([received], part)",
        "tests/collectives/test_collectives.py -k specification",
    ),
    Mutation(
        "2 same input, same bits: sums run in rank order",
        f"{PACKAGE}/algorithms.py",
        "decode_sum(inbox, flat)",
        "decode_sum(inbox[::-1], flat)",
        "tests/collectives/test_collectives.py -k specification",
    ),
    Mutation(
        "3 bounded error: the scale is rounded up",
        f"{PACKAGE}/codec/uniform.py",
        "torch.where(scale * self.levels < spread, next_up(scale), scale)",
        "scale",
        "tests/codec/test_codec.py -k bounded or kind_of_data",
    ),
    Mutation(
        "4 NaN and Inf survive",
        f"{PACKAGE}/codec/blocks.py",
        "return (high < infinity[0]) & (low > infinity[1])",
        "return (high < infinity[0]) | (low > infinity[1])",
        "tests/codec/test_codec.py -k nan_or_inf",
    ),
    Mutation(
        "5 never touched: integers",
        f"{PACKAGE}/policy.py",
        "    if dtype not in DTYPES:",
        "    if dtype == torch.float64:",
        "tests/collectives/test_collectives.py -k deferred",
    ),
    Mutation(
        "5 never touched: the output layer",
        f"{PACKAGE}/seams/where.py",
        "with at(None if is_output_layer(self, weight) else",
        "with at(None if False else",
        "tests/megatron/test_seams.py",
    ),
    Mutation(
        "6 every rank takes the same branch: shared memory is voted on",
        f"{PACKAGE}/transport/segment.py",
        "    reason = votes.failure(reason, group)\n    segments",
        "    segments",
        "tests/comm/test_streams.py -k without_room",
    ),
    Mutation(
        "6 every rank takes the same branch: a file that one rank cannot use",
        f"{PACKAGE}/agreement.py",
        "{thresholds.problem(config.thresholds) or ranges.digest(config.thresholds)}",
        "",
        "tests/collectives/test_agreement.py",
    ),
    Mutation(
        "7 never silently off: the first forward that compressed nothing",
        f"{PACKAGE}/announce.py",
        "        elif nothing:",
        "        elif False:",
        "tests/megatron/test_announce.py",
    ),
    Mutation(
        "7 never silently off: strict",
        f"{PACKAGE}/announce.py",
        "    if config.strict:",
        "    if False:",
        "tests/megatron/test_strict.py",
    ),
    Mutation(
        "8 reversible: disable() restores the very objects",
        f"{PACKAGE}/api.py",
        "    seams.uninstall()\n",
        "    pass\n",
        "tests/megatron/test_seams.py",
    ),
    Mutation(
        "9 nothing hangs: configurations are compared",
        f"{PACKAGE}/agreement.py",
        "    if len(set(texts)) == 1:",
        "    if True:",
        "tests/collectives/test_collectives.py -k different_configs",
    ),
    Mutation(
        "9 nothing hangs: messages carry the configuration's digest",
        f"{PACKAGE}/transport/link.py",
        'f"{self.configuration} {self.text}"',
        'f"{self.text}"',
        "tests/comm/test_faults.py -k else",
    ),
    Mutation(
        "9 nothing hangs: messages of different calls never meet over gloo",
        f"{PACKAGE}/transport/group.py",
        "return TAG | (call.number % 64) << 16 | (call.check ^ length)",
        "return TAG",
        "tests/comm/test_faults.py -k else",
    ),
    Mutation(
        "9 nothing hangs: a dead process is seen by its lock",
        f"{PACKAGE}/transport/streams.py",
        "each.descriptor if rank != me else -1",
        "-1",
        "tests/comm/test_streams.py -k killed",
    ),
    Mutation(
        "9 nothing hangs: strangers do not take a rank's place",
        f"{PACKAGE}/transport/sockets.py",
        "if hmac.compare_digest(shown, password) and rank",
        "if rank",
        "tests/comm/test_streams.py -k strangers",
    ),
    Mutation(
        "9 nothing hangs: bytes before the counter that shows them, for all threads to see",
        "csrc/cpu/ring.cpp",
        "out_->written.value.store(written + moved);",
        "out_->written.value.store(written + moved, std::memory_order_relaxed);",
        "tests/stress/test_sanitized.py -k streams-races",
    ),
    Mutation(
        "9 nothing hangs: decode stays inside its payload",
        "csrc/cpu/codec_cpu.cpp",
        "    const int64_t octets = last * at.block / 8 < at.octets ? last * at.block / 8 : at.octets;",
        "    const int64_t octets = last * at.block / 8;",
        "tests/stress/test_sanitized.py -k speak[codec]",
    ),
    Mutation(
        "1 ranks agree: in the fused kernel, the second phase waits for the sums",
        "csrc/cuda/collectives.h",
        "        announce(kGatherLeg);\n        if (!await(kGatherLeg)) return false;\n        decode();",
        "        decode();",
        "tests/gpu/test_cuda_emulated.py -k kernels",
    ),
    Mutation(
        "6 every rank takes the same branch: the inboxes that one GPU cannot reach are voted on",
        f"{PACKAGE}/transport/peer.py",
        "votes.failure(self._open(handles), group)",
        "self._open(handles)",
        "tests/gpu/test_cuda_emulated.py -k faults",
    ),
    Mutation(
        "9 nothing hangs: inboxes of GPUs are tried before they are trusted",
        f"{PACKAGE}/transport/workspace.py",
        "reason = votes.failure(_trial(made, group), group)",
        'reason = ""',
        "tests/gpu/test_cuda_emulated.py -k faults",
    ),
    Mutation(
        "10 never slower: small tensors are left alone",
        f"{PACKAGE}/policy.py",
        'return f"below {least} bytes" if nbytes < least else None',
        "return None",
        "tests/collectives/test_collectives.py -k deferred",
    ),
)


def copy(folder: Path) -> None:
    """The repository as it stands, with its built extension, without what git ignores."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    built = [str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).glob("_C*.so")]
    for name in [*listed.stdout.decode().splitlines(), *built]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def survives(mutation: Mutation, folder: Path) -> str:
    """What is wrong if the tests do not notice ``mutation``; empty if they do."""
    path = folder / mutation.file
    original = path.read_text()
    if original.count(mutation.before) != 1:
        return f"{mutation.file} holds {original.count(mutation.before)} times: {mutation.before}"
    path.write_text(original.replace(mutation.before, mutation.after))
    try:
        pytest = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-p", "no:cacheprovider"]
        variables = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'tests'}", "OMP_NUM_THREADS": "1"}
        words = mutation.tests.replace(" -k ", "\n-k\n").split("\n")
        ended = subprocess.run([*pytest, *words], cwd=folder, env=variables, capture_output=True, text=True)
    finally:
        path.write_text(original)
    return "" if ended.returncode == 1 else f"{mutation.tests}: exit code {ended.returncode}\n{ended.stdout[-500:]}"


def main(words: list[str]) -> int:
    """0 if every mutation was noticed."""
    chosen = [each for each in MUTATIONS if not words or any(word in each.invariant for word in words)]
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        copy(Path(name))
        for mutation in chosen:
            wrong = survives(mutation, Path(name))
            failures += bool(wrong)
            print(f"{'NOT NOTICED' if wrong else 'noticed'}: {mutation.invariant}", wrong, flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} mutations noticed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
