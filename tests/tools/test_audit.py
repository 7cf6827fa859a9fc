"""The audit of installed packages: hashes.txt fits constraints.txt, and a changed file is noticed."""

from __future__ import annotations

import re
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import audit
import pytest

FILES = {"thing/__init__.py": b"x = 1\n", "thing-1.0.dist-info/WHEEL": b"Tag: py3-none-any\n"}


def installed(folder: Path, files: dict[str, bytes]) -> Distribution:
    """A package as pip leaves it."""
    rows = [f"{name},sha256={audit.encoded(content, 'sha256')},{len(content)}" for name, content in files.items()]
    record = "\n".join([*rows, "thing-1.0.dist-info/RECORD,,"])
    for name, content in (files | {"thing-1.0.dist-info/RECORD": record.encode()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return Distribution.at(folder / "thing-1.0.dist-info")


def test_an_installed_file_that_was_changed_or_is_gone_is_noticed(tmp_path: Path) -> None:
    thing = installed(tmp_path, FILES)
    assert audit.is_for_all(thing) and audit.changed(thing) == []
    (tmp_path / "thing" / "__init__.py").write_text("x = 2\n")
    assert audit.changed(thing) == ["thing/__init__.py"]
    (tmp_path / "thing" / "__init__.py").unlink()
    assert audit.changed(thing) == ["thing/__init__.py"]


def test_a_package_with_other_files_than_its_wheel_is_noticed(tmp_path: Path) -> None:
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    assert audit.foreign(installed(tmp_path / "same", FILES), wheel) == []
    assert audit.foreign(installed(tmp_path / "more", FILES | {"thing/evil.py": b""}), wheel) == ["thing/evil.py"]
    other = installed(tmp_path / "other", FILES | {"thing/__init__.py": b"x = 2\n"})
    assert audit.changed(other) == [] and audit.foreign(other, wheel) == ["thing/__init__.py"]


def test_every_hash_is_of_a_pinned_version_and_names_no_index() -> None:
    text = audit.HASHES.read_text()
    hashed, pinned = audit.pinned(text), audit.pinned((audit.ROOT / "constraints.txt").read_text())
    assert set(hashed) <= set(pinned) and len(hashed) == len(set(hashed)) > 50
    rows = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.search(r" --hash=sha256:[0-9a-f]{64}$", line) for line in rows) and len(rows) == len(hashed)
    assert "://" not in text


def test_every_installed_wheel_for_all_platforms_has_a_hash() -> None:
    hashed = set(audit.pinned(audit.HASHES.read_text()))
    missing = []
    for each in filter(lambda each: each.holds_here, audit.pinned((audit.ROOT / "constraints.txt").read_text())):
        try:
            found = distribution(each.name)
        except PackageNotFoundError:
            continue
        if found.version == each.version and audit.is_for_all(found) and each not in hashed:
            missing.append(each.name)
    assert not missing, f"python tests/stress/audit.py write: no hash of {missing}"


@pytest.mark.parametrize(("marker", "holds"), [("", True), ('python_version < "3.11"', None)])
def test_markers_are_those_of_the_running_python(marker: str, holds: bool | None) -> None:
    import sys

    expected = sys.version_info < (3, 11) if holds is None else holds
    assert audit.Pinned("a", "1", marker).holds_here == expected
