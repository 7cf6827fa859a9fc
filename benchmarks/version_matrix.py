"""Which seam fits which version: docs/versions.md from the sources of every supported release.

    python benchmarks/version_matrix.py MEGATRON_GIT TRANSFORMER_ENGINE_GIT [--packages DIR] [--engines DIR...]

Both are clones with their tags, of NVIDIA/Megatron-LM and NVIDIA/TransformerEngine. What has no tag is read as pip
installs it: a megatron-core from --packages, Transformer Engines, oldest first, from --engines (unpacked wheels).
Nothing of them is imported: whole signatures are read (flashcomm_megatron/megatron/checkout.py). A name that a version
does not have shows as a dash.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flashcomm_megatron.megatron import checkout, seams, training_log
from flashcomm_megatron.megatron.arguments import SEAMS as DOORS

ROOT = Path(__file__).resolve().parent.parent
# Every supported release of Megatron-LM, with the Transformer Engine that its pyproject.toml names (0.13 names none;
# of a range the newest, of a commit the release it became).
MEGATRON = {
    "0.13.0": "2.3", "0.13.1": "2.3", "0.14.0": "2.7", "0.15.0": "2.9", "0.15.1": "2.9", "0.15.2": "2.9",
    "0.15.3": "2.9", "0.16.0": "2.11", "0.16.1": "2.11", "0.17.0": "2.14.1", "0.17.1": "2.14.1", "0.18.0": "2.16",
    "0.18.2": "2.16", "0.19.0": "2.17.1",
}  # fmt: skip
TRANSFORMER_ENGINE = (
    "2.1", "2.2", "2.3", "2.4", "2.5", "2.6", "2.7", "2.8", "2.9", "2.10", "2.11", "2.12", "2.13", "2.14.1", "2.15",
    "2.16", "2.17.1", "2.18",
)  # fmt: skip
MAIN = "main"  # what the clones have checked out
States = dict[str, str]


@contextmanager
def sources(git: Path, tag: str, *names: str) -> Iterator[Path]:
    """A folder with some files and folders of one release."""
    packed = subprocess.run(["git", "-C", str(git), "archive", tag, *names], check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(folder, filter="data")
        yield Path(folder)


def megatron(git: Path, engine: Path, version: str) -> States:
    """State of every row of one Megatron-LM, with its Transformer Engine."""
    with (
        sources(git, _tag("core_v", version), "megatron/core", "megatron/training") as folder,
        sources(engine, _tag("v", MEGATRON.get(version, MAIN)), "transformer_engine/pytorch") as other,
    ):
        return _states(folder, other)


def engines(git: Path, folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Version and sources of every Transformer Engine: tags, then what pip unpacked, then main."""
    for version in TRANSFORMER_ENGINE:
        with sources(git, _tag("v", version), "transformer_engine/pytorch") as folder:
            yield version, folder
    for folder in folders:
        (info,) = folder.glob("transformer_engine-*.dist-info")
        yield info.stem.removeprefix("transformer_engine-"), folder
    with sources(git, _tag("v", MAIN), "transformer_engine/pytorch") as folder:
        yield MAIN, folder


def _states(folder: Path, engine: Path) -> States:
    rows = [*seams.rows_of(checkout.version(folder), with_transformer_engine=True, with_tokens=True)]
    rows += [row for row in (*DOORS, training_log.SEAM) if checkout.has(row.module, folder)]
    return dict(checkout.status(rows, folder, engine))


def _tag(prefix: str, version: str) -> str:
    return "HEAD" if version == MAIN else prefix + version


def patches(git: Path) -> States:
    """What patches/make.py says of every release."""
    script = [sys.executable, str(ROOT / "patches" / "make.py"), str(git), "--check"]
    lines = subprocess.run(script, capture_output=True, text=True).stdout.splitlines()
    return {tag.removeprefix("core_v"): state for tag, _, state in (line.split(maxsplit=2) for line in lines)}


def table(columns: dict[str, States], first: str) -> list[str]:
    """Rows of Markdown: one name a row, one version a column; what does not fit is a number, explained below."""
    names = list(dict.fromkeys(name for states in columns.values() for name in states))
    notes: dict[str, int] = {}
    lines = [_row([first, *columns]), _row(["---", *[":-:"] * len(columns)])]
    for name in names:
        cells = [_cell(states.get(name), notes) for states in columns.values()]
        lines.append(_row([f"`{name}`", *cells]))
    return [*lines, "", *(f"{number}. {note}" for note, number in notes.items())]


def _cell(state: str | None, notes: dict[str, int]) -> str:
    if state is None or state == "fits":
        return state or "-"
    fits, _, note = state.partition("; ")
    number = notes.setdefault(note or state, len(notes) + 1)
    return f"{fits} ({number})" if note else f"({number})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(git: Path, engine_git: Path, package: Path | None, engine_packages: Sequence[Path]) -> str:
    """The whole page."""
    applied = patches(git)
    columns = {version: megatron(git, engine_git, version) for version in MEGATRON}
    beside = dict(MEGATRON)
    rows = [row for row in seams.TRANSFORMER_ENGINE if row.module.startswith("transformer_engine")]
    engine_columns = {}
    for version, folder in engines(engine_git, engine_packages):
        engine_columns[version] = dict(checkout.status(rows, folder))
        if package is not None and version != MAIN:  # at the end, with the newest released one
            columns[checkout.version(package)] = _states(package, folder)
            beside[checkout.version(package)] = version
    columns[MAIN], beside[MAIN] = megatron(git, engine_git, MAIN), MAIN
    head = table(columns, "seam")
    last = [
        _row(["with Transformer Engine", *beside.values()]),
        _row(["[patch](../patches/README.md)", *(applied.get(version, "-") for version in beside)]),
    ]
    end = 2 + len({name for states in columns.values() for name in states})
    above = "\n".join([INTRODUCTION, *head[:end], *last, *head[end:]]).rstrip()
    return "\n".join([above, MIDDLE, *table(engine_columns, "seam")]).rstrip() + "\n"


INTRODUCTION = """# Versions

Written by `benchmarks/version_matrix.py` from the sources of each release; nothing was imported or run. *fits*: the
name is there, and its replacement can be called with everything that it can be called with. A number beside it says
which arguments, given with another value than their default, leave the call to the original. A dash: that version has
no such name. *main* is Megatron-LM d98e8a6 (0.20.0) and Transformer Engine d0067d0. What is run, and not only read, is
0.16.1 (`make test`) and the newest that pip installs (`make test-newest`, 0.19.2 when this was written). For another
checkout ask `python -m flashcomm_megatron report --megatron DIR`. What does not fit is refused, by name, when
the flag is given: nothing is replaced then.

## Megatron-LM and megatron-core
"""
MIDDLE = """
## Transformer Engine

Rows of Transformer Engine's own modules, by its releases. They are looked up where Megatron finds the package.
"""


def main() -> None:
    """Write docs/versions.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megatron", type=Path, metavar="MEGATRON_GIT")
    parser.add_argument("engine", type=Path, metavar="TRANSFORMER_ENGINE_GIT")
    parser.add_argument("--packages", type=Path, metavar="DIR")
    parser.add_argument("--engines", type=Path, metavar="DIR", nargs="*", default=[])
    options = parser.parse_args()
    written = page(options.megatron, options.engine, options.packages, options.engines)
    (ROOT / "docs" / "versions.md").write_text(written)


if __name__ == "__main__":
    main()
