"""`fastflow compile` and what `fastflow doctor` says of its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastflow.cli.app import app
from fastflow.cli.compile import spread
from fastflow.compile import nvcc_aot, report, triton_aot


def fastflow(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="fastflow")


def test_options_take_several_words() -> None:
    assert spread(["--arch", "sm_80", "sm_90", "--out", "x", "--backend", "triton"]) == (
        ["--arch", "sm_80", "--arch", "sm_90", "--out", "x", "--backend", "triton"]
    )
    assert spread(["--arch=sm_80", "--json"]) == ["--arch=sm_80", "--json"]


def test_a_folder_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "kernels"
    only = "f32/f32 plain none next_sample+flags"
    result = fastflow("compile", "--arch", "sm_120", "--backend", "triton", "--out", out, "--only", only)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    step = [words for words in lines if words[:2] == ["triton", "step_kernel"]]
    assert [words[2] for words in step] == ["sm_120"]
    assert all(words[-1] == "yes" and words[5:7] == ["0", "0"] for words in step)  # loads; spills and stack
    assert f"2 kernels in {out}" in result.stdout
    monkeypatch.setenv("FASTFLOW_CACHE_DIR", str(out))
    found = json.loads(fastflow("doctor", "--json").stdout)["cache"]
    assert found == {"folder": str(out), "archs": ["sm_120"], "cuda": [], "problems": []}
    manifest = out / "triton" / "sm_120" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"triton": "3.1.4"}))
    text = " ".join(fastflow("doctor").stdout.split())
    assert "is stale: Triton was 3.1.4" in text and "fastflow compile --arch sm_120" in text


def test_doctor_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTFLOW_CACHE_DIR", raising=False)
    assert json.loads(fastflow("doctor", "--json").stdout)["cache"] is None
    monkeypatch.setenv("FASTFLOW_CACHE_DIR", str(tmp_path / "none"))
    (problem,) = json.loads(fastflow("doctor", "--json").stdout)["cache"]["problems"]
    assert "none does not exist; run `fastflow compile --out DIR`" in problem
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTFLOW_CACHE_DIR", str(tmp_path / "file"))
    (problem,) = json.loads(fastflow("doctor", "--json").stdout)["cache"]["problems"]
    assert problem.startswith("FASTFLOW_CACHE_DIR: ") and "file is a file, wanted a folder; run" in problem


def test_json_and_spills(monkeypatch: pytest.MonkeyPatch, entries: list[dict[str, Any]], tmp_path: Path) -> None:
    found = [entry | {"loads": {128: 8, 32: 3}} for entry in entries[:2]]
    found[1] |= {"spills": True, "stack": 16, "local_accesses": 4}
    monkeypatch.setattr(triton_aot, "build", lambda *arguments: found)
    result = fastflow("compile", "--backend", "triton", "--out", tmp_path, "--json")
    assert result.exit_code == 1
    rows = json.loads(result.stdout)
    assert [row["kernel"] for row in rows] == [entry["kernel"] for entry in found]
    assert set(rows[0]) == set(report.PUBLIC) and rows[0]["loads"] == {"128": 8, "32": 3}
    words = " ".join(result.stderr.split())
    assert "1 kernels spill registers: " in words and "stack 16, local 0, 4 spill instructions" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--arch", "sm_75"), "--arch: wanted names among sm_80"),
        (("--arch", "sm_80", "volta"), "got 'volta'"),
        (("--backend", "rocm"), "--backend: wanted cuda or triton, got 'rocm'"),
        (("--backend", "triton", "--only", "f64"), "--only: no variant's name has 'f64' in it"),
    ],
)
def test_what_cannot_be_served(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = fastflow("compile", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    result = fastflow("compile", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "--out: wanted a folder, got the file" in " ".join(result.stderr.split())


def test_the_interpreter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = fastflow("compile", "--backend", "triton", "--out", tmp_path)
    assert result.exit_code == 2 and "TRITON_INTERPRET is set" in result.stderr


def test_a_missing_ptxas_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs", reason="needs triton 3.4 or newer")
    monkeypatch.setattr(type(knobs.nvidia).__dict__["ptxas"], "default_path", str(tmp_path / "ptxas"))
    result = fastflow("compile", "--backend", "triton", "--out", tmp_path)
    assert result.exit_code == 2
    assert "ptxas is missing from the Triton wheel" in " ".join(result.stderr.split())


def test_help_has_examples() -> None:
    text = fastflow("compile", "--help").stdout
    assert "Examples" in text and "fastflow compile --out kernels" in text
    assert "PTX of compute_80 and compute_120" in " ".join(text.split())


def test_ptx_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc_aot, "build", lambda *arguments: [])
    result = fastflow("compile", "--backend", "cuda", "--arch", "sm_90", "--out", tmp_path)
    assert "module holds code for sm_90, and PTX of compute_80 and compute_120" in " ".join(result.stdout.split())
