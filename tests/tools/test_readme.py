"""README and docs say what is true: their paths, links, flags, variables, make targets and commands exist.

A document is read as its links and its code (fenced blocks and backticks); prose is left alone. Words with
placeholders (``DIR``, ``<x>``, ``...``) never look like a path of ours.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from patience import patient

import flashcomm_megatron as fc
from flashcomm_megatron.__main__ import COMMANDS
from flashcomm_megatron.config import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "benchmarks" / "rivals.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
HISTORY = ROOT / "docs" / "log.md"  # dated entries: what they name may have gone since
CURRENT = [path for path in DOCUMENTS if path != HISTORY]

FOLDERS = r"(?:flashcomm_megatron|csrc|examples|benchmarks|docs|tests|patches|\.ci)"
PATH = re.compile(
    rf"(?<![\w./-]){FOLDERS}/[\w./*-]*[\w/*]|(?<![\w./-])(?:[A-Z]+\.md|Makefile|[a-z]+\.(?:txt|toml|py))(?![\w/])"
)
THEIRS = {"sitecustomize.py"}  # files that the reader makes
PUBLIC = (
    *("Config", "enable", "disable", "flashcomm", "add_arguments", "stats", "reset_stats", "report"),
    *("all_reduce", "reduce_scatter", "all_gather", "encode", "decode", "wire_bytes"),
)


def code(path: Path) -> str:
    """The fenced blocks and backticks of a document, with shell line continuations joined."""
    text = path.read_text()
    fences = re.findall(r"^```.*?\n(.*?)^```", text, re.S | re.M)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    return re.sub(r"\\\n\s*", " ", "\n".join([*fences, *spans]))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def slug(heading: str) -> str:
    """The anchor that renders for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@lru_cache
def our_flags() -> set[str]:
    parser = argparse.ArgumentParser()
    fc.add_arguments(parser)
    return set(parser._option_string_actions)


@lru_cache
def read_by_us() -> str:
    """All our sources that may read an environment variable."""
    folders = ("flashcomm_megatron", "csrc", "tests")
    files = [ROOT / "setup.py", *(file for folder in folders for file in (ROOT / folder).rglob("*.[pch]*"))]
    return "".join(file.read_text() for file in files if file.suffix in (".py", ".h", ".cpp", ".cu"))


def test_links_in_documents_resolve() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            page = path.parent / file if file else path
            assert page.exists(), f"{name(path)} links to {target}"
            headings = re.findall(r"^#+ (.*)", page.read_text(), re.M) if anchor else []
            assert not anchor or anchor in map(slug, headings), f"{name(path)} links to {target}; no such heading"


def paths(text: str, path: Path) -> Iterator[str]:
    return (word for word in set(PATH.findall(code(path))) - THEIRS if not any(ROOT.glob(word.rstrip("/"))))


def flags(text: str, path: Path) -> set[str]:
    return set(re.findall(r"--flash-comm(?:-[a-z]+)+", text)) - our_flags()


def script_options(text: str, path: Path) -> Iterator[str]:
    """In a command that runs one of our scripts, every option is one that the script defines."""
    for script, rest in re.findall(r"((?:examples|benchmarks)/\w+\.py)(.*)", code(path)):
        source = (ROOT / script).read_text()
        options = re.findall(r"(?<!\S)--[a-z][a-z-]*", rest.split("#")[0])
        yield from (f"{script} {each}" for each in options if f'"{each}"' not in source and each not in our_flags())


def variables(text: str, path: Path) -> Iterator[str]:
    return (word for word in set(re.findall(r"FLASH_?COMM_[A-Z_]+", text)) if word not in read_by_us())


def make_targets(text: str, path: Path) -> set[str]:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    return set(re.findall(r"(?:^|[ ;&])make ((?!\w+=)[a-z-]+)", code(path), re.M)) - targets


def commands(text: str, path: Path) -> set[str]:
    return set(re.findall(r"-m flashcomm_megatron ([a-z]+)(?![\w./])", code(path))) - set(COMMANDS)


def code_blocks(text: str, path: Path) -> Iterator[str]:
    """Python compiles, and names of the package that it uses exist; every line of JSON is JSON."""
    for kind, block in re.findall(r"^```(python|json)\n(.*?)^```", text, re.S | re.M):
        if kind == "json":
            yield from (line for line in block.splitlines() if not json.loads(line))
            continue
        names = [node.attr for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)
                 and isinstance(node.value, ast.Name) and node.value.id == "fc"]  # fmt: skip
        yield from (each for each in names if not hasattr(fc, each))


@pytest.mark.parametrize("unknown", [paths, flags, script_options, variables, make_targets, commands, code_blocks])
def test_what_documents_name_exists(unknown: Callable[[str, Path], Iterable[str]]) -> None:
    for path in CURRENT:
        assert not list(unknown(path.read_text(), path)), name(path)


def test_readme_opens_with_the_command() -> None:
    """The command and what it prints come within the first 30 lines."""
    opening = "\n".join(README.read_text().splitlines()[:30])
    assert "-m flashcomm_megatron" in opening and "--flash-comm-bits" in opening
    assert "flash-comm:" in opening


def test_readme_says_first_that_no_gpu_has_run_it_and_is_short() -> None:
    lines = README.read_text().splitlines()
    assert any("No GPU has run" in line for line in lines[:20]), "the first screen hides what has not been proven"
    assert len(lines) <= 150


def test_readme_repeats_how_far_the_planner_is_off() -> None:
    (stated,) = re.findall(r"(\d+) of (\d+)\s+(?:held-out|published) figures", README.read_text())
    assert stated in re.findall(r"(\d+) of (\d+) held-out figures", (ROOT / "docs" / "planner.md").read_text())


def test_options_page_has_the_help_of_every_flag() -> None:
    """benchmarks/readme_tables.py writes it; run that after a change of config.py."""
    page = (ROOT / "docs" / "options.md").read_text()
    for field in dataclasses.fields(fc.Config):
        assert f"`--flash-comm-{field.name.replace('_', '-')}` | {field.metadata['help']}" in page, field.name
    assert all(f"| `{variable}` | {text} |" in page for variable, text in VARIABLES.items())


def test_every_page_is_in_the_sites_navigation() -> None:
    """``make docs`` builds it strictly; this holds without mkdocs."""
    listed = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_public_names_are_exported() -> None:
    assert set(PUBLIC) <= set(fc.__all__), sorted(set(PUBLIC) - set(fc.__all__))
    assert all(hasattr(fc, public) for public in fc.__all__)
    undocumented = [public for public in PUBLIC if not re.search(rf"``[^`]*\b{public}\b", fc.__doc__ or "")]
    assert not undocumented, f"the package's docstring leaves out {undocumented}"


def test_the_example_runs_on_two_ranks(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.S)
    assert found and "fc.all_reduce" in found[1]
    script = tmp_path / "example.py"
    script.write_text(found[1] + "assert x2.shape == x.shape and fc.stats()['quantized'] == 1\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=patient(180))
    assert ran.returncode == 0, ran.stderr
