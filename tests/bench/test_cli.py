"""The command in a tiny setting: tables, files, one line for what is wrong."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cli, launch, run, step
from bench.cli import main
from bench.registry import Mismatch

TINY = ["--sizes", "2x4x8x8", "--threads", "1", "--repeats", "2", "--backend", "reference"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_list_names_every_benchmark(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("step", "launch", "rollout", "16x16x64x64", "tests/bench/test_step.py"))


def test_step_prints_ratios_and_writes_a_file(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "results" / "step.csv"
    assert main(["step", *TINY, "--no-compile", "--csv", str(path)]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("fused", "noise given", "x eager", "GB/s", "of copy", "faults", "load", run.COPY)
    )
    rows = list(csv.DictReader(path.open()))
    assert [row["variant"] for row in rows] == [step.FUSED, step.FUSED_GIVEN, step.EAGER, step.EAGER_GIVEN, run.COPY]
    fused = rows[0]
    assert (fused["shape"], fused["threads"], fused["backend"]) == ("2x4x8x8", "1", "reference")
    assert float(fused["median ms"]) > 0 and float(fused["ratio to eager"]) > 0 and float(fused["share of copy"]) > 0
    assert all(
        fused[name] for name in ("device", "cpu model", "isa", "torch", "git sha", "date", "iqr ms", "GB/s", "load")
    )
    assert rows[2]["ratio to eager"] == ""


def test_launch(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ENTRY", replace(launch.ENTRY, calls=2))
    assert main(["launch", "--repeats", "2", "--backend", "reference"]) == 0
    out = capsys.readouterr().out
    assert "median us" in out and all(v.name in out for v in launch.ENTRY.variants)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stride"], "invalid choice: 'stride'"),
        (["step", "--sizes", "16by16"], "--sizes: wanted a shape such as 16x16x64x64, got '16by16'"),
        (["step", "--threads", "0"], "--threads: wanted an int of at least 1, got '0'"),
        (["step", "--backend", "gpu"], "backend: wanted"),
        (["step", "--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_what_is_wrong_takes_one_line(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert main(arguments) == cli.USAGE
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_failed_check_reports_no_speed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: object) -> None:
        raise Mismatch("log_prob of the fused step: off by 1")

    monkeypatch.setattr(step, "compare", differs)
    assert main(["step", *TINY, "--no-compile"]) == cli.FAILED
    captured = capsys.readouterr()
    assert "no speed without correctness: log_prob of the fused step: off by 1" in captured.err
    assert "median" not in captured.out


def test_a_red_gate_reports_no_speed(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = tmp_path / "test_gate.py"
    gate.write_text("def test_it():\n    assert 1 == 2\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(step, "ENTRY", replace(step.ENTRY, gate=gate.name))
    assert main(["step", *TINY, "--verify"]) == cli.FAILED
    captured = capsys.readouterr()
    assert "test_gate.py is not green" in captured.err
    assert "median" not in captured.out
