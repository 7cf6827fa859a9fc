"""A network cable that is pulled: put back in time, nobody notices; left out, both ranks name each other in time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from link_hosts import Hosts, Refused  # noqa: E402


def cable(hosts: Hosts, state: str) -> None:
    """The first machine's port of the switch, "up" or "down"."""
    subprocess.run(["ip", "-n", hosts._switch, "link", "set", "port0", state], check=True)


def wait_for(paths: Sequence[Path], ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all files are there."""
    for _ in range(1200):
        if all(path.exists() for path in paths):
            return
        assert any(rank.poll() is None for rank in ranks), "the ranks ended early"
        time.sleep(0.1)
    raise AssertionError(f"{paths} are not there after two minutes")


def play(hosts: Hosts, folder: Path) -> list[str]:
    """What each rank said at its end."""
    variables = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "tests" / "support" / "link_cut_rank.py")]
    ranks = [hosts.start(rank, [*script, str(rank), str(folder)], variables) for rank in (0, 1)]
    try:
        wait_for([folder / f"ready-{rank}" for rank in (0, 1)], ranks)
        cable(hosts, "down")
        time.sleep(1)
        cable(hosts, "up")
        (folder / "go on").touch()
        wait_for([folder / f"fragile-{rank}" for rank in (0, 1)], ranks)
        cable(hosts, "down")
        wait_for([folder / f"error-{rank}" for rank in (0, 1)], ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(folder / f"error-{rank}").read_text() for rank in (0, 1)]


def test_a_cut_link_is_survived_when_short_and_named_when_not(tmp_path: Path) -> None:
    try:
        with Hosts(2, None) as hosts:
            first, second = play(hosts, tmp_path)
    except Refused as reason:
        pytest.skip(str(reason))
    assert "no message passed between this rank and rank 1 (allowed: 3 s)" in first or "rank 1" in first, first
    assert "rank 0" in second, second
    assert all(int((tmp_path / f"calls-{rank}").read_text()) >= 10 for rank in (0, 1))
    assert not [name for name in os.listdir("/run/netns") if name.startswith(hosts._prefix)]
