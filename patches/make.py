"""Write and verify the patches of this folder: the flags and the call, for people who vendor Megatron-LM.

    python patches/make.py MEGATRON_GIT            # write one patch for each minor version, then verify
    python patches/make.py MEGATRON_GIT --check    # verify only

``MEGATRON_GIT`` is a clone of NVIDIA/Megatron-LM with its tags. A patch adds lines and changes none. It is made from
a minor version's newest release and has to apply, by ``git apply --check``, to every release of that version.
"""

from __future__ import annotations

import argparse
import difflib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
OLDEST = (0, 13)
RELEASE = re.compile(r"core_v(\d+)\.(\d+)\.(\d+)")
# file: (the lines to put before, added lines)
ADDITIONS = {
    "megatron/training/arguments.py": (
        re.compile(r"(?<=\n)    return parser\n"),  # the first: that of add_megatron_arguments
        "    import flashcomm_megatron\n    parser = flashcomm_megatron.add_arguments(parser)\n\n",
    ),
    "megatron/training/initialize.py": (
        re.compile(r"(?<=    args = get_args\(\)\n)    initialize_rerun_state_machine\(\n"),
        "    from flashcomm_megatron.megatron.arguments import enable_from\n    enable_from(args)\n",
    ),
}


def releases(git: Path) -> dict[tuple[int, int], list[str]]:
    """Tags of every supported minor version, oldest release first."""
    found: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for tag in _git(git, "tag").decode().split():
        match = RELEASE.fullmatch(tag)
        if match and (version := (int(match[1]), int(match[2]))) >= OLDEST:
            found.setdefault(version, []).append((int(match[3]), tag))
    return {version: [tag for _, tag in sorted(tags)] for version, tags in sorted(found.items())}


def path(version: tuple[int, int]) -> Path:
    """The patch for a minor version."""
    return FOLDER / "core_v{}.{}.patch".format(*version)


def make(git: Path, tag: str) -> str:
    """The patch for one release; ValueError if a file has no place for an addition."""
    return "".join(
        line for name in ADDITIONS for line in _hunks(name, _git(git, "show", f"{tag}:{name}").decode(), tag)
    )


def verify(git: Path, tag: str, patch: Path) -> str:
    """What ``git apply --check`` says about ``patch`` and a release: empty if it applies."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(_git(git, "archive", tag, *ADDITIONS))) as files:
            files.extractall(folder, filter="data")
        done = subprocess.run(["git", "apply", "--check", str(patch)], cwd=folder, capture_output=True, text=True)
        return done.stderr


def _hunks(name: str, before: str, tag: str) -> Iterator[str]:
    place, added = ADDITIONS[name]
    match = place.search(before)
    if match is None:
        raise ValueError(f"{tag}: {name} has no line {place.pattern!r}.")
    after = before[: match.start()] + added + before[match.start() :]
    lines = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return difflib.unified_diff(*lines, f"a/{name}", f"b/{name}", n=1)


def _git(git: Path, *command: str) -> bytes:
    return subprocess.run(["git", "-C", str(git), *command], check=True, capture_output=True).stdout


def main() -> int:
    """0 if every patch applies to every release of its version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("git", type=Path, metavar="MEGATRON_GIT")
    parser.add_argument("--check", action="store_true", help="verify the patches that are here, write none")
    options = parser.parse_args()
    failed = False
    for version, tags in releases(options.git).items():
        patch = path(version)
        if not options.check:
            patch.write_text(make(options.git, tags[-1]))
        for tag in tags:
            problem = verify(options.git, tag, patch)
            failed |= bool(problem)
            print(f"{tag:15} {patch.name:18} {problem.strip() or 'applies'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
