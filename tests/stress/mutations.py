"""Break every invariant once and see its test fail: what the tests are worth.

    python tests/stress/mutations.py [WORD ...]     all mutations, or those whose invariant holds one of the words

Each row of ``MUTATIONS`` changes one place in a copy of the repository and names the tests that must then fail. A
mutation that no test notices is an error of the tests'. The numbers are those of the invariants in docs/reliability.md.

A row finds its place by the function it is in and by the few tokens that matter, so that a comment may be reworded, a
line wrapped, another file of the same room become the function's home. Where a row finds nothing or finds its place
twice, test_mutations.py fails, which `make test` runs. The compiled extension is copied, not built again: what is
broken in csrc is built into programs of sanitized.py, or by emulator.py.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "flashcomm_megatron"
SOURCES = (".py", ".h", ".cpp", ".cu")

# Tests failed; or died, because the extension cut payloads in another way than Python, which had measured them.
NOTICED = (1, -signal.SIGABRT, -signal.SIGSEGV)


class Mutation(NamedTuple):
    """In ``function`` of ``room`` (a folder or a file) the one match of ``pattern`` becomes ``becomes``.

    ``tests`` (pytest's words) must then fail. ``pattern`` and ``becomes`` are those of ``re.sub``; a blank in
    ``pattern`` stands for any white space or none.
    """

    invariant: str
    room: str
    function: str
    pattern: str
    becomes: str
    tests: str


class Lost(Exception):
    """A mutation's place is not there, or there twice."""


MUTATIONS = (
    Mutation(
        "1 ranks agree: a rank's own part passes through the codec too",
        f"{PACKAGE}/collectives",
        "all_gather",
        r"plan\.gather\.decode_slices\( boxes\.gathered , whole , out \)",
        "plan.gather.decode_slices(boxes.gathered, whole, out); whole.of(out.view(-1))[plan.comm.rank][:] = x.view(-1)",
        "tests/collectives/test_collectives.py -k specification",
    ),
    Mutation(
        "2 same input, same bits: sums run in rank order",
        f"{PACKAGE}/collectives",
        "_one_step",
        r"reduce_slices\( received , x ,",
        "reduce_slices(received.payloads()[::-1], x,",
        "tests/collectives/test_collectives.py -k specification",
    ),
    Mutation(
        "3 bounded error: the scale is rounded up",
        f"{PACKAGE}/codec",
        "_scale",
        r"torch\.where\( (\w+) \* self\.levels < \w+ , next_up\( \w+ \) , \w+ \)",
        r"\1",
        "tests/codec/test_codec.py -k analytic_bound or kind_of_data",
    ),
    Mutation(
        "4 NaN and Inf survive",
        f"{PACKAGE}/codec",
        "finite_keys",
        r"\) & \(",
        ") | (",
        "tests/codec/test_codec.py -k nan_or_inf",
    ),
    Mutation(
        "5 never touched: integers",
        f"{PACKAGE}/collectives",
        "_reason",
        r"if dtype not in DTYPES :",
        "if dtype == torch.float64:",
        "tests/collectives/test_collectives.py -k deferred",
    ),
    Mutation(
        "5 never touched: the output layer",
        f"{PACKAGE}/megatron",
        "column_forward",
        r"(\w+\.)?is_output_layer\( \w+ , \w+ \)",
        "False",
        "tests/megatron/test_seams.py",
    ),
    Mutation(
        "6 every rank takes the same branch: shared memory is voted on",
        f"{PACKAGE}/comm",
        "share",
        r"votes\.failure\( (\w+) , group \)(?=\s*if mine is not None and)",
        r"\1",
        "tests/comm/test_shared_memory.py -k without_room",
    ),
    Mutation(
        "6 every rank takes the same branch: a file that one rank cannot use",
        f"{PACKAGE}/collectives",
        "_options",
        r"minimum_size\.problem\( config\.thresholds \) or ranges\.digest\( config\.thresholds \)",
        "''",
        "tests/collectives/test_agreement.py",
    ),
    Mutation(
        "7 never silently off: the first forward that compressed nothing",
        f"{PACKAGE}/megatron",
        "judge",
        r"if silent :",
        "if False:",
        "tests/megatron/test_coverage.py",
    ),
    Mutation(
        "7 never silently off: strict",
        f"{PACKAGE}/observe",
        "unexpected",
        r"if config\.strict :",
        "if False:",
        "tests/megatron/test_strict.py",
    ),
    Mutation(
        "8 reversible: disable() restores the very objects",
        f"{PACKAGE}/megatron",
        "disable",
        r"installation\.uninstall\( \)",
        "pass",
        "tests/megatron/test_seams.py",
    ),
    Mutation(
        "9 nothing hangs: deferred calls are noted as well",
        f"{PACKAGE}/collectives",
        "decide",
        r"(\w+\.calls\.note\( \w+\.noted \))",
        r"found.deferred or \1",
        "tests/comm/test_faults.py -k else",
    ),
    Mutation(
        "9 nothing hangs: configurations are compared",
        f"{PACKAGE}/collectives",
        "_compare",
        r"if len\( set\( \w+ \) \) == 1 :",
        "if True:",
        "tests/collectives/test_collectives.py -k different_configs",
    ),
    Mutation(
        "9 nothing hangs: messages carry the configuration's digest",
        f"{PACKAGE}/collectives",
        "_title",
        r"\{agreement\.digest\( config \)\}",
        "",
        "tests/comm/test_faults.py -k else",
    ),
    Mutation(
        "9 nothing hangs: messages of different calls never meet over gloo",
        f"{PACKAGE}/comm",
        "_post",
        r"tag \| \( call\.check \^ length \)",
        "TAG",
        "tests/comm/test_faults.py -k else",
    ),
    Mutation(
        "9 nothing hangs: a dead process is seen by its lock",
        f"{PACKAGE}/comm",
        "__init__",
        r"-1 if rank == self\.rank else each\.descriptor",
        "-1",
        "tests/comm/test_shared_memory.py -k killed",
    ),
    Mutation(
        "9 nothing hangs: bytes before the counter that shows them, for all threads to see",
        "csrc/cpu",
        "Rings::write",
        r"(written\.value\.store\( [^;]*?) \) ;",
        r"\1, std::memory_order_relaxed);",
        "tests/stress/test_sanitized.py -k streams-races",
    ),
    Mutation(
        "9 nothing hangs: decode stays inside its payload",
        "csrc/cpu",
        "decode_range",
        r"i < \( blocks \* size \+ 7 \) / 8 ;",
        "i < (blocks * size + 7) / 8 + 2;",
        "tests/stress/test_sanitized.py -k speak[codec]",
    ),
    Mutation(
        "1 ranks agree: in the fused kernel, a block waits for each source before it decodes what that sent",
        "csrc/cuda",
        "receive",
        r"if \( count > 0 \|\| d == 0 \) await\( source \) ;",
        "if (count == 0 && d == 0) await(source);",
        "tests/gpu/test_emulated.py -k any_world",
    ),
    Mutation(
        "1 ranks agree: in the fused kernel, regions are a ring of four",
        "csrc/cuda",
        "region_of",
        r"exchange & \( kRegions - 1 \)",
        "exchange & 1",
        "tests/gpu/test_emulated.py -k stalled_reader",
    ),
    Mutation(
        "6 every rank takes the same branch: the inboxes that one GPU cannot reach are voted on",
        f"{PACKAGE}/comm/inboxes.py",
        "__init__",
        r"votes\.failure\( self\._open\( (\w+) \) , group \)",
        r"self._open(\1)",
        "tests/gpu/test_cuda_emulated.py -k faults",
    ),
    Mutation(
        "9 nothing hangs: inboxes of GPUs are tried before they are trusted",
        f"{PACKAGE}/comm",
        "_try",
        r"votes\.failure\( _trial\( \w+ , group \) , group \)",
        '""',
        "tests/gpu/test_cuda_emulated.py -k faults",
    ),
    Mutation(
        "10 never slower: small tensors are deferred",
        f"{PACKAGE}/collectives",
        "_reason",
        r"return small if nbytes < minimum else None",
        "return None",
        "tests/collectives/test_collectives.py -k deferred",
    ),
    Mutation(
        "11 feedback only where it was measured right",
        f"{PACKAGE}/megatron",
        "_leave",
        r"not votes\.failure\( .* if visit\.adds_up\( output \) .* , visit\.group \)",
        "True",
        "tests/megatron/test_feedback.py",
    ),
    Mutation(
        "8 never in the way: torch.compile",
        f"{PACKAGE}/megatron",
        "_bind",
        r"replacement = outside\( replacement \)",
        "pass",
        "tests/megatron/test_compiled_layers.py",
    ),
    Mutation(  # a format without compiled form: that would write payloads of other lengths
        "12 a row stands alone: no block spans two rows",
        f"{PACKAGE}/codec",
        "rows_of",
        r"if width is None or width >= numel :",
        "if True:",
        "tests/codec/test_rows.py",
    ),
    Mutation(
        "12 a row stands alone: nor in any collective",
        f"{PACKAGE}/codec",
        "rows_of",
        r"if width is None or width >= numel :",
        "if True:",
        "tests/collectives/test_rows_stand_alone.py",
    ),
)


def functions(path: Path, name: str) -> Iterator[tuple[int, int]]:
    """Where in the text of ``path`` the functions of that name begin and end."""
    text = path.read_text()
    if path.suffix == ".py":
        starts = [0]
        for line in text.encode().splitlines(keepends=True):
            starts.append(starts[-1] + len(line.decode()))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                yield starts[node.lineno - 1], starts[node.end_lineno or node.lineno]
        return
    for found in re.finditer(rf"\b{name}\([^;{{}}]*\)[^;{{}}()]*\{{", text):
        yield found.start(), closing(text, found.end())


def closing(text: str, inside: int) -> int:
    """Where the brace that was opened before ``inside`` is closed."""
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[inside], 0)
        inside += 1
    return inside


def place(mutation: Mutation, root: Path) -> tuple[Path, re.Match[str]]:
    """The file, and what the mutation replaces in it; Lost if that is not exactly one place."""
    room = root / mutation.room
    files = [room] if room.is_file() else sorted(path for path in room.rglob("*") if path.suffix in SOURCES)
    pattern = re.compile(mutation.pattern.replace(" ", r"\s*"))
    found = [
        (path, match)
        for path in files
        for start, end in functions(path, mutation.function)
        for match in pattern.finditer(path.read_text(), start, end)
    ]
    if len(found) != 1:
        raise Lost(
            f"{mutation.invariant}: {len(found)} places in {mutation.function} of {mutation.room} match "
            f"{mutation.pattern}. Mend this row of tests/stress/mutations.py."
        )
    return found[0]


def mutated(mutation: Mutation, root: Path) -> tuple[Path, str]:
    """The file that the mutation changes, and its text after it."""
    path, match = place(mutation, root)
    text = match.string
    return path, text[: match.start()] + match.expand(mutation.becomes) + text[match.end() :]


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
    path, text = mutated(mutation, folder)
    original = path.read_text()
    path.write_text(text)
    try:
        pytest = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-p", "no:cacheprovider"]
        variables = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        words = mutation.tests.replace(" -k ", "\n-k\n").split("\n")
        ended = subprocess.run([*pytest, *words], cwd=folder, env=variables, capture_output=True, text=True)
    finally:
        path.write_text(original)
    return (
        "" if ended.returncode in NOTICED else f"{mutation.tests}: exit code {ended.returncode}\n{ended.stdout[-500:]}"
    )


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
