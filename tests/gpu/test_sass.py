"""The machine code of the kernels, run by an interpreter (tests/support/sass): bits, exchanges, bounds, counts.

Codecs on ordinary and strange data, collectives of two and three ranks, on sm_90 and, the codecs of flash-v1 and auto,
on sm_80. Every access is checked for its bounds and its alignment, every exchange for lanes that are elsewhere.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from codec_cases import KINDS, tensor
from sass import kernels
from sass.disassembly import missing
from sass.kernels import ALL, FIRST, Kernels
from sass.memory import BadAccessError
from sass.state import DivergenceError
from specification import expected, same, strange

from flashcomm_megatron.codec import Rotated, Spike, Uniform

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing()), reason=f"no machine code to look at: {missing()}"),
]
FLASH, AUTO = (Uniform(4, 32), Uniform(4, 128)), (Rotated(4.5, 32), Rotated(5, 64))
COUNTS = "benchmarks/results/sass_counts.json"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_sass  # noqa: E402


def is_right(run: Kernels, codec, x, shift: int = 0, counts: tuple[int, ...] = (1, 3)) -> None:
    """Payload and sums are the definition's, bit for bit."""
    parts = [x, x.flip(0).contiguous(), -x]
    payloads = [codec.encode_ref(part) for part in parts]
    assert torch.equal(run.encode(codec, x, shift=shift), payloads[0]), codec
    for count in counts:
        want = codec.decode_sum_ref(payloads[:count], x.numel(), x.dtype)
        assert same(run.decode_sum(codec, payloads[:count], x.numel(), shift=shift), want), (codec, count)


@pytest.mark.parametrize("codec", [*FLASH, *AUTO, Rotated(4, 32), Rotated(8, 256), Rotated(2.5, 16)], ids=str)
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
def test_strange_data(architecture, codec):
    """Of sm_80 encoding alone: its decoder indexes its arguments, which the interpreter does not know to do."""
    run, counts = Kernels(architecture, torch.bfloat16, FIRST), (1, 3) if architecture == "sm_90" else ()
    for kind in KINDS:
        is_right(run, codec, tensor(kind, 2049, torch.bfloat16), counts=counts)


@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
def test_every_codec(dtype):
    run = Kernels("sm_90", dtype, ALL)
    codecs = [
        Uniform(bits, block) for bits, block in ((4, 8), (4, 24), (4, 64), (4, 256), (8, 128), (8, 32), (8, 1000))
    ]
    codecs += [Rotated(bits, block) for bits, block in ((2, 16), (3.5, 32), (5.5, 128), (6, 64), (7.5, 32))]
    codecs += [Spike(bits, block) for bits, block in ((2, 64), (5, 24), (8, 32))]
    for codec, numel in product(codecs, (1, 5000)):
        is_right(run, codec, strange(numel, dtype))


@pytest.mark.parametrize("width", [96, 576, 5120])
def test_rows_that_end_inside_a_super_block(width):
    run = Kernels("sm_90", torch.bfloat16, ALL)
    for codec, rows in product((Rotated(4.5, 32), Rotated(5, 64), Rotated(8, 16)), (2, 7)):
        parts = [strange(rows * width, torch.bfloat16, seed) for seed in range(3)]
        payloads = [codec.encode_ref(part, width) for part in parts]
        assert torch.equal(run.encode(codec, parts[0], width=width), payloads[0]), codec
        for count in (1, 3):
            want = codec.decode_sum_ref(payloads[:count], rows * width, torch.bfloat16, width)
            assert same(run.decode_sum(codec, payloads[:count], rows * width, width=width), want), (codec, count)


def test_tensors_that_start_anywhere():
    run = Kernels("sm_90", torch.bfloat16, FIRST)
    for codec, shift in product((FLASH[0], AUTO[0]), (2, 8)):
        is_right(run, codec, strange(3001, torch.bfloat16), shift=shift)


@pytest.mark.parametrize(
    ("legs", "codecs"),
    [("rotated", AUTO), ("uniform4", FLASH[:1] * 2), ("spike", (Spike(3, 64),) * 2)],
    ids=["auto", "flash-v1", "spike"],
)
def test_collectives(legs, codecs):
    run = Kernels("sm_90", torch.bfloat16, f"-DLEGS={legs}")
    for kind, (world, numel) in product(kernels.KINDS, ((2, 10002), (3, 3003))):
        calls = [[strange(numel, torch.bfloat16, 10 * call + rank) for rank in range(world)] for call in range(2)]
        for found, parts in zip(run.collective(kind, codecs, calls), calls, strict=True):
            for out, want in zip(found, expected(kind, codecs, parts), strict=True):
                assert same(out, want), (kind, world)


# ---- what must be found -------------------------------------------------------------------------------------------


def mutated(root, tmp_path, file: str, old: str, new: str):
    """A copy of csrc in which ``old`` stands as ``new``."""
    shutil.copytree(root / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / file
    assert source.read_text().count(old) == 1, "the mutation does not fit the source any more"
    source.write_text(source.read_text().replace(old, new))
    return tmp_path


ONE_SITE = "    share_largest(magnitude);\n"
TWO_SITES = """    uint32_t nothing[kParts];
    FC_UNROLL for (int part = 0; part < kParts; part++) nothing[part] = magnitude[part] | 1;
    if (is_finite(x, 0, begin, values)) share_largest(magnitude);
    else share_largest(nothing), magnitude[0] = magnitude[kParts - 1] = nothing[0];
"""


def test_an_exchange_at_two_places_of_a_warp_is_found(root, tmp_path):
    """Once such a bug was there. On sm_90 lanes of both places wait apart; sm_80 sends both to one subroutine."""
    tree = mutated(root, tmp_path, "cuda/rotated_measure.h", ONE_SITE, TWO_SITES)
    run, codec = Kernels("sm_90", torch.bfloat16, FIRST, root=tree), AUTO[1]
    run.encode(codec, tensor("normal", 2048, torch.bfloat16))
    with pytest.raises(DivergenceError, match=r"different places|elsewhere"):
        run.encode(codec, strange(2048, torch.bfloat16))


def test_an_access_out_of_bounds_is_found():
    run = Kernels("sm_90", torch.bfloat16, FIRST)
    payload = AUTO[0].encode_ref(strange(2048, torch.bfloat16))
    with pytest.raises(BadAccessError, match="out of bounds"):
        run.decode_sum(AUTO[0], [payload[:-32].clone()], 2048)


# ---- what the code must look like ---------------------------------------------------------------------------------


def test_instructions_and_wavefronts_are_as_committed(root):
    """benchmarks/bench_sass.py wrote the counts; more than 3 % above them is a loss that somebody should see."""
    committed = json.loads((root / COUNTS).read_text())["counts"]["sm_90"]
    assert not {name for name, row in committed.items() if row["instructions"] > (bench_sass.bar(name) or 1000)}
    for name, found in bench_sass.codec_counts("sm_90").items():
        assert found["instructions"] <= committed[name]["instructions"] * 1.03, name
        assert found["wavefronts"] <= max(committed[name]["wavefronts"] * 1.03, found["ideal_wavefronts"] * 1.1), name


@pytest.mark.parametrize("legs", ["rotated", "uniform4"])
def test_the_protocol_is_ordered_for_the_whole_system(legs):
    """Flags: stored strongly behind a fence, behind the block's barrier; read strongly, a fence before the barrier."""
    program = Kernels("sm_90", torch.bfloat16, f"-DLEGS={legs}").programs["collective_legs"]
    lines = [program[address].text for address in sorted(program)]
    strong = [i for i, line in enumerate(lines) if re.search(r"ST\S*\.64\.STRONG\.SYS", line)]
    assert len(strong) >= 2
    for place in strong:
        before = lines[max(0, place - 60) : place]
        assert any("MEMBAR" in line and "SYS" in line for line in before), lines[place]
    assert any(re.search(r"LD\S*\.64\.STRONG\.SYS", line) for line in lines)


@pytest.mark.parametrize(
    ("architecture", "what"),
    [("sm_90", FIRST), ("sm_80", FIRST), ("sm_90", "-DLEGS=rotated"), ("sm_90", "-DLEGS=carrying")],
)
def test_no_local_memory(architecture, what):
    for name, program in Kernels(architecture, torch.bfloat16, what).programs.items():
        assert not {instruction.op for instruction in program.values()} & {"LDL", "STL"}, f"{name} spills"


def test_widths_of_memory_accesses():
    """Single bytes of shared memory are scales, one for a block or a thread; global memory moves in 16 bytes."""
    run, world, numel = Kernels("sm_90", torch.bfloat16, "-DLEGS=rotated"), 2, 16384
    x = [tensor("normal", numel, torch.bfloat16, seed) for seed in range(world)]
    run.collective("two-step", AUTO, [x])
    written = world * (numel // AUTO[0].block + numel // world // AUTO[1].block)
    read = world * 2 * numel // 32  # values of a thread; both legs
    single = sum(count for (_, size), count in run.counts.shared_widths.items() if size == 1)
    assert single < 1.1 * (written + read)
    widths = run.counts.global_widths
    other = sum(
        count for (_, size), count in widths.items() if size != 16
    )  # flags, and every thread looks for an error
    assert other < 0.1 * sum(widths.values())
