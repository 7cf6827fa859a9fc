"""`make wheel`: a wheel that says which glibc it needs, and that installs and works where there is no compiler."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="wheels are for x86-64 Linux"),
]

SCRIPT = """
import torch
import flashcomm_megatron as fc
from flashcomm_megatron.codec import {native} as native
assert fc.__file__.startswith({venv!r}), fc.__file__
assert native.available(), native.reason()
config, x = fc.Config(bits=4), torch.randn(1000)
assert fc.decode(fc.encode(x, config), x.shape, x.dtype, config).shape == x.shape
print(native.describe())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A CPU wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    environment = {**os.environ, "FLASHCOMM_CUDA": "0"}
    subprocess.run([*command, str(folder), str(ROOT)], check=True, env=environment, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.timeout(900)
def test_needs_no_newer_glibc_than_ubuntu_22(wheel) -> None:
    """2.35. auditwheel tags it with what it needs (`make wheel`)."""
    pytest.importorskip("auditwheel")
    said = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"manylinux_2_(\d+)_x86_64", " ".join(said.split()))
    assert found is not None and int(found[1]) <= 35, said


@pytest.mark.timeout(900)
def test_installs_and_works_without_a_compiler(wheel, tmp_path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python, environment = venv / "bin" / "python", {"PATH": str(venv / "bin"), "HOME": str(tmp_path)}
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env=environment, cwd=tmp_path)
    purelib = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    (venv / purelib / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    name = "native" if (ROOT / "flashcomm_megatron" / "codec" / "native.py").exists() else "extension"
    script = SCRIPT.format(native=name, venv=str(venv))
    done = subprocess.run([str(python), "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compiled codec" in done.stdout
