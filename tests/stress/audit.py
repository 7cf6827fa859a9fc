"""Whether the installed packages are what their publishers released: hashes.txt, and every file's own checksum.

    python tests/stress/audit.py          fetch the wheels of hashes.txt, which pip checks, and compare with them
    python tests/stress/audit.py write    write hashes.txt anew from constraints.txt

hashes.txt holds the SHA-256 of every wheel of constraints.txt that is one file on all platforms (py3-none-any). The
others differ by platform, Python and index (torch comes with CUDA or without), and pip asks hashes of all packages as
soon as one has them, so `make` installs by constraints.txt alone and this is a check of its own. A package
that was installed from such a wheel must hold its very files; any other must fit the checksums that came with it
(RECORD), which shows what was changed after it was installed, not who made it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HASHES = ROOT / "hashes.txt"
HEAD = """# Wheels of constraints.txt that are one file on every platform: tests/stress/audit.py write.
"""
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
ANYWHERE = ["--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none"]
WRITTEN_BY_PIP = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"}  # beside the wheel's own files


class Pinned(NamedTuple):
    """A line of constraints.txt: ``name==version``, and for which Python it holds ("" for all)."""

    name: str
    version: str
    marker: str

    @property
    def holds_here(self) -> bool:
        """The only markers in use are ``python_version < "3.11"`` and its contrary."""
        return not self.marker or (sys.version_info < (3, 11)) == ("<" in self.marker)


def pinned(text: str) -> list[Pinned]:
    """All lines of a file of constraints or of hashes."""
    lines = [line.split("--hash")[0].split("#")[0].strip() for line in text.splitlines()]
    parts = [re.fullmatch(r"([\w.-]+)==([^\s;]+)\s*(?:;\s*(.*?))?", line) for line in lines if line]
    return [Pinned(found[1], found[2], found[3] or "") for found in parts if found]


# ---- writing --------------------------------------------------------------------------------------------------------


def row(each: Pinned) -> str:
    """The line of hashes.txt; empty if there is no wheel for all platforms."""
    python = "--python-version=3.10" if "<" in each.marker else "--python-version=3.11"
    with tempfile.TemporaryDirectory() as folder:
        fetched = [*PIP, *ANYWHERE, python, "--dest", folder, f"{each.name}=={each.version}"]
        if subprocess.run(fetched, capture_output=True).returncode:
            return ""
        (wheel,) = Path(folder).iterdir()
        marker = f"; {each.marker}" if each.marker else ""
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        return f"{each.name}=={each.version}{marker} --hash=sha256:{digest}\n"


def write() -> None:
    """hashes.txt."""
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(row, pinned((ROOT / "constraints.txt").read_text())))
    HASHES.write_text(HEAD + "".join(rows))


# ---- checking -------------------------------------------------------------------------------------------------------


def fetch(folder: Path) -> dict[str, Path]:
    """{package: its wheel}; pip refuses a wheel whose hash is another."""
    subprocess.run([*PIP, *ANYWHERE, "--require-hashes", "--dest", str(folder), "-r", str(HASHES)], check=True)
    return {normal(wheel.name.split("-")[0]): wheel for wheel in folder.iterdir()}


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_for_all(installed: Distribution) -> bool:
    """Whether it came as a wheel for all platforms; some packages have others beside it."""
    return "-none-any" in (installed.read_text("WHEEL") or "")


def changed(installed: Distribution) -> list[str]:
    """Files of an installed package that are gone or do not fit its RECORD."""
    wrong = []
    for file in installed.files or []:
        if file.hash is None:  # RECORD itself, and what Python compiled
            continue
        path = Path(str(installed.locate_file(file)))
        if not path.is_file() or encoded(path.read_bytes(), file.hash.mode) != file.hash.value:
            wrong.append(str(file))
    return wrong


def encoded(content: bytes, algorithm: str) -> str:
    """A checksum as RECORD writes it."""
    return base64.urlsafe_b64encode(hashlib.new(algorithm, content).digest()).rstrip(b"=").decode()


def foreign(installed: Distribution, wheel: Path) -> list[str]:
    """Files that the wheel and the installed package do not share; commands that pip wrote for it are left out."""
    with zipfile.ZipFile(wheel) as archive:
        theirs = {
            name: encoded(archive.read(name), "sha256")
            for name in archive.namelist()
            if not name.endswith("/") and ".data/" not in name and Path(name).name not in WRITTEN_BY_PIP
        }
    ours = {
        str(file): file.hash.value
        for file in installed.files or []
        if file.hash is not None and ".." not in file.parts and file.name not in WRITTEN_BY_PIP
    }
    return sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))


def findings(wheels: dict[str, Path]) -> Iterator[tuple[str, bool, str]]:
    """Of every installed package of constraints.txt: its name, whether it has a hash, what is wrong with it."""
    for each in pinned((ROOT / "constraints.txt").read_text()):
        try:
            installed = distribution(each.name)
        except PackageNotFoundError:
            continue
        if not each.holds_here:
            continue
        wheel = wheels.get(normal(each.name)) if is_for_all(installed) else None
        if installed.version.split("+")[0] != each.version:
            yield each.name, wheel is not None, f"version {installed.version}, pinned {each.version}"
            continue
        files = changed(installed) + (foreign(installed, wheel) if wheel else [])
        yield each.name, wheel is not None, f"other files: {', '.join(files[:5])}" if files else ""


def main(words: list[str]) -> int:
    """The command line of the docstring."""
    if words == ["write"]:
        write()
        return 0
    if words:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = list(findings(fetch(Path(folder))))
    hashed = sum(has_hash for _, has_hash, _ in found)
    wrong = [f"{name}: {what}" for name, _, what in found if what]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{hashed} packages compared with the wheels of {HASHES.name}, {len(found) - hashed} with their own RECORD")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
