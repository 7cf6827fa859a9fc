"""Lanes of a warp exchange at the same place of the program, and threads of a block meet at the same barrier.

On GPUs since Volta a shuffle or vote that lanes reach by different calls exchanges garbage, or hangs. Two checks: the
text of csrc/cuda has no exchange, vote or barrier under a condition that is not in :data:`UNIFORM`; and the stand-in's
fibers stop when lanes meet at different places (stand_ins/cuda/fibers.cpp). Both find the mistake that was once made.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
RIGHT = "    share_largest(magnitude);\n"
WRONG = "    if (is_finite(x, 0, begin, values)) share_largest(magnitude);\n    else share_largest(magnitude);\n"

# Conditions under which functions that exchange, vote or wait may be called, and why all lanes of a warp, or where
# there is a barrier all threads of a block, see the same.
UNIFORM = {
    "the call, the shape and the codec are the same for all threads": {
        "phase == kDecode",
        "is_sum()",
        "!pushes",
        "count == 1",
        "p < count",
        "t < from.tiles",
        "t < of.tiles",
        "slice < filled",
        "count & 1",
        "d < call.shape.depth",
        "job.d() < call.shape.depth",
        "values == 0",
        "count < call.world",
        "!pair_shift",
        "levels <= kSearched",
        "kAlone && adds_codes()",
        "(values & (block() - 1)) == 0",
        "kOwn",
        "kOwn || !lanes",
        "lanes",
        "has_two()",
        "has_one()",
        "stride < lanes",
        "stride < 1 << octet_shift >> kThreadShift",
        "kOwn || kShared || (values & (block() - 1))",
        "kResiduals",
        "!kShared",
        "kShared",
        "stride >> shift",
        "kRows<T> == 2 && kShared",
    },
    "constants": {"row < kRows<T>", "part < kParts", "i < 8", "stride < 8", "stride < kWarp"},
    "answers of a barrier or a vote, the same for all": {
        "more",
        "!sync_and(has_all && !is_missing)",
        "Reduce::kRotates && !",
        "~votes(is_plain)",
    },
    "read from shared memory behind the barrier before which one thread wrote it": {
        "is_missing",
        "count == 0 || !is_here[count & 1]",
        "count > 0 || d == 0",
    },
    "octets and blocks by whole warps; no barrier inside": {
        "kRows<T> * (thread() & ~(kWarp - 1)) >= octets",
        "(Codec::kRotates ? kRows<T> * (lane & ~(kWarp - 1)) : octet) >= octets",
    },
}
CONVERGENT = {"sync", "sync_and", "exchange", "votes"}  # device.h
CODEC = {"encode_to", "decode_from", "finish"}  # of a codec's members, those that may exchange or wait (tile.h)
FROM_ELSEWHERE = {name: CODEC for name in ("collectives.h", "codec_kernels.h", "rowed_codec.h")}


def without_comments(text: str) -> str:
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r'"(?:\\.|[^"\\])*"', '""', text)
    return re.sub(r"^\s*#.*$", "", text, flags=re.M)


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "({[") - (text[place] in ")}]")
        if depth == 0:
            return place
    return len(text)


def end_of_statement(text: str, start: int) -> int:
    while text[start] != ";":
        start = closing(text, start) + 1 if text[start] in "({[" else start + 1
        if text[start - 1] == "}":
            return start - 1
    return start


def end_of_block(text: str, start: int) -> int:
    """Where the block that holds ``start`` ends."""
    while start < len(text) and text[start] != "}":
        start = closing(text, start) + 1 if text[start] in "({[" else start + 1
    return start


def functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, start and end of the body of every function of the device."""
    for found in re.finditer(r"(?:FC_DEVICE|FC_INLINE)[^;{}()]*?\b(\w+)\s*\(", text):
        body = re.match(r"\s*(?:const)?\s*\{", text[closing(text, found.end() - 1) + 1 :])
        if body:
            start = closing(text, found.end() - 1) + body.end()
            yield found[1], start, closing(text, start)


def calls(text: str, names: set[str], start: int, end: int) -> list[int]:
    pattern = rf"\b(?:{'|'.join(sorted(names))})\s*(?:<[^;(){{}}]*>)?\s*\("
    return [start + found.start() for found in re.finditer(pattern, text[start:end])]


def convergent(text: str, name: str) -> set[str]:
    """Names of functions that exchange, vote or wait, by way of others too."""
    names = CONVERGENT | FROM_ELSEWHERE.get(name, set())
    while True:
        more = {each for each, start, end in functions(text) if calls(text, names, start, end)} - names
        if not more:
            return names
        names |= more


def conditions(text: str, start: int, at: int) -> Iterator[str]:
    """The conditions that decide whether a call at ``at``, in the function whose body starts at ``start``, is made."""
    for found in re.finditer(r"\b(if|for|while) \(", text[start:at]):
        head = start + found.end() - 1
        closes = closing(text, head)
        if closes >= at:  # the call is part of the condition
            before = text[head + 1 : at]
            if found[1] != "for" and re.search(r"\?|&&|\|\|", before):
                yield before
            continue
        body = closes + 1 + len(re.match(r"\s*", text[closes + 1 :])[0])  # type: ignore[index]
        if text[body] == ";":  # of do ... while
            continue
        end = closing(text, body) if text[body] == "{" else end_of_statement(text, body)
        leaves = re.search(r"\b(return|continue|break)\b", text[body : end + 1])
        if end >= at or (leaves and end_of_block(text, start + found.start()) >= at):
            condition = text[head + 1 : closes]
            yield condition.split(";")[1] if found[1] == "for" else condition
    statement = re.split(r"[;{}]", text[start:at])[-1]
    if re.search(r"\?|&&|\|\|", statement) and not re.match(r"\s*(if|for|while)\b", statement):
        yield statement


def suspects(text: str, name: str) -> set[str]:
    """Conditions of convergent calls that nobody has said to be uniform."""
    text = without_comments(text)
    names = convergent(text, name)
    found = {
        " ".join(condition.split())
        for _, start, end in functions(text)
        for at in calls(text, names, start, end)
        for condition in conditions(text, start, at)
    }
    return found - set().union(*UNIFORM.values())


def text_of(path: Path) -> str:
    """A header's text; of a tile also that of the functions it defines out of line."""
    also = path.with_name("rotated_measure.h") if path.name == "rotated_blocks.h" else None
    return path.read_text() + (also.read_text() if also else "")


@pytest.mark.parametrize("path", sorted(CUDA.glob("*.h")), ids=lambda path: path.name)
def test_no_exchange_vote_or_barrier_depends_on_a_lane(path: Path) -> None:
    assert not suspects(text_of(path), path.name), "a lane's own condition, or one to be added to UNIFORM"


def test_the_static_check_finds_a_shuffle_that_depends_on_a_lane() -> None:
    text = text_of(CUDA / "rotated_blocks.h")
    assert RIGHT in text
    assert any("is_finite(" in found for found in suspects(text.replace(RIGHT, WRONG), "rotated_blocks.h"))
    early = text.replace("measure(c, begin, meta);", "if (begin >= octets) return; measure(c, begin, meta);")
    assert "begin >= octets" in suspects(early, "rotated_blocks.h")


def run(folder: Path, right: bool) -> subprocess.CompletedProcess[str]:
    """lanes.cpp over a copy of rotated_measure.h, with the line as it stands or as it once stood."""
    compiler = shutil.which(os.environ.get("CXX", "g++").split()[0])
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = (CUDA / "rotated_measure.h").read_text()
    (folder / "cuda").mkdir()
    (folder / "cuda" / "rotated_measure.h").write_text(text if right else text.replace(RIGHT, WRONG))
    flags = ["-std=c++17", "-O1", "-fno-omit-frame-pointer", "-fno-thread-jumps", "-ffp-contract=off"]
    folders = [f"-I{each}" for each in (folder, ROOT / "csrc", ROOT / "tests" / "support")]
    sources = [ROOT / "tests" / "gpu" / "lanes.cpp", ROOT / "tests" / "support" / "stand_ins" / "cuda" / "fibers.cpp"]
    program = folder / "lanes"
    subprocess.run([compiler, *flags, *folders, *map(str, sources), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True)


@pytest.mark.slow
def test_the_stand_in_stops_lanes_that_exchange_at_different_places(tmp_path: Path) -> None:
    for name, right in (("right", True), ("wrong", False)):
        (tmp_path / name).mkdir()
        ended = run(tmp_path / name, right)
        if right:
            assert ended.returncode == 0, ended.stderr
        else:
            assert ended.returncode != 0 and "exchange at different places" in ended.stderr
