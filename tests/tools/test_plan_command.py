"""The command `plan`: measurements it takes, what it prints and draws, and the sentences it refuses with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashcomm_megatron import __main__ as entry
from flashcomm_megatron.config import Config
from flashcomm_megatron.tools.plan import PROJECTION, measured
from flashcomm_megatron.tools.plan import command as plan_command
from flashcomm_megatron.tools.plan.cost import Collective, Speed, on_cpu, seconds

MIB = 2**20


# ---- measurements ----------------------------------------------------------------------------------------------------

LAB = {"rate_bits_per_second": 8e9, "latency_seconds": 1e-3, "compute_seconds": 0.5}
LAB |= {"encode_gbytes_per_second": 10.0, "decode_gbytes_per_second": 20.0}


def test_a_measured_link_replaces_the_assumed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lab.json"
    path.write_text(json.dumps(LAB))
    lab = measured.lab(path)
    sums, packed = Collective("all_reduce", 128 * 4096, 2, 64), on_cpu(Config(bits=4), lab.encode, lab.decode)
    expected = lab.compute_seconds + seconds(lab.link, sums, packed)
    plain = on_cpu(Config(bits=4, recipe="flash-v1", algorithm="one-step"), lab.encode, lab.decode)
    wire, coding = 128 * 4096 * 4.25 / 8 / 1e9, MIB / 10e9 + 2 * MIB / 20e9
    by_hand = 1e-3 + wire + coding  # in one piece, so that nothing is hidden behind the wire
    assert seconds(lab.link, sums._replace(times=1), plain) == pytest.approx(by_hand)
    given = ["--link-rate", "8Gbit", "--latency", "1e-3", "--compute-seconds", "0.5", "--codec-speed", "10,20"]
    shape = ["--tp", "2", "--model", "llama-2-7b", "--batch", "1", "--seq", "128", "--bits", "4", "--json"]
    for source in (["--measured", str(path)], given):
        assert plan_command.main([*source, *shape]) == 0
        found = json.loads(capsys.readouterr().out)["rows"]
        assert found[1]["step_seconds"] == pytest.approx(expected)


def test_what_a_measurement_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lab.json"
    path.write_text(json.dumps({**LAB, "compute_seconds": None}))
    assert plan_command.main(["--measured", str(path)]) == 2
    assert "compute_seconds should be a number, found None" in capsys.readouterr().err
    assert plan_command.main(["--link-rate", "1Gbit"]) == 2
    assert "--compute-seconds, --codec-speed missing" in capsys.readouterr().err


def test_gpu_check_replaces_the_assumption(tmp_path: Path) -> None:
    row = {"bits": 4, "dtype": "bfloat16", "encode GB/s": 3000, "decode GB/s": 2000}
    for name, machine in (("a", "NVIDIA A100 80GB PCIe"), ("b", "NVIDIA A100-SXM4-80GB")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {"gpu": machine}, "measured": {"codec": [row]}}))
    assert measured.find_gpu_check("A100-PCIe", tmp_path) == tmp_path / "a.json"
    assert measured.find_gpu_check("A100", tmp_path) == tmp_path / "b.json"
    assert measured.find_gpu_check("H100", tmp_path) is None
    assert measured.gpu_check(tmp_path / "a.json", 4) == Speed(3000e9, 2000e9)
    with pytest.raises(ValueError, match="no codec of 8 bits"):
        measured.gpu_check(tmp_path / "a.json", 8)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--recipe", "flash-v1", "--link-rate", "12GB"],
        ["--nodes", "6", "--rate", "100"],
        ["--json"],
        ["--nodes", "2", "--json"],
    ],
    ids=" ".join,
)
def test_everything_printed_says_that_it_is_a_projection(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["plan", "--gpu", "L40", "--tp", "4", *argv]) == 0
    out = capsys.readouterr().out
    assert PROJECTION in out
    if "--json" in argv:
        assert json.loads(out)["rows"]


@pytest.mark.parametrize("argv", [[], ["--nodes", "4"]], ids=["one node", "four"])
def test_a_sweep_is_drawn(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "folder" / "sweep.png"
    assert plan_command.main(["--gpu", "A100", "--sweep", "--out", str(path), *argv]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert PROJECTION in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--gpu", "V100"], "--gpu V100: choose L40, L20, 4090, A100, A100-PCIe, H100"),
        (["--gpu", "L40", "--link", "wire"], "--link wire: choose pcie4, pcie4-sockets"),
        (["--gpu", "L40", "--model", "gpt-5"], "--model gpt-5: choose llama-2-7b"),
        (["--gpu", "L40", "--recipe", "flash-v1", "--bits", "5"], "choose 4, 6 or 8 with recipe flash-v1"),
        (["--gpu", "L40", "--tp", "1"], "one GPU sends nothing"),
        (["--gpu", "L40", "--tp", "5"], "llama-3-70b has 64 attention heads, which 5 GPUs cannot share"),
    ],
)
def test_what_does_not_exist_is_said(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_command.main(argv) == 2
    assert says in capsys.readouterr().err


def test_a_measured_rate_replaces_the_usual_link(capsys: pytest.CaptureFixture[str]) -> None:
    """24 GB/s named, or given: the same times."""
    found = []
    for given in (["--link", "pcie4"], ["--link-rate", "24GB"], []):
        assert plan_command.main(["--gpu", "L40", "--json", *given]) == 0
        found.append([row["ttft_seconds"] for row in json.loads(capsys.readouterr().out)["rows"]])
    assert found[0] == found[1] != found[2]


def test_what_does_not_fit_and_what_has_no_kernel_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_command.main(["--gpu", "4090", "--tp", "2", "--recipe", "mx"]) == 0
    out = capsys.readouterr().out
    assert "does not fit: " in out and "no fused kernel" in out
    assert plan_command.main(["--gpu", "A100", "--recipe", "auto"]) == 0
    assert "no fused kernel" not in capsys.readouterr().out
