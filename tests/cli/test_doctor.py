"""`fastflow doctor` on this machine, and on machines that are not at hand."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fastflow as ff
from fastflow import backends, doctor


def test_report_of_this_machine() -> None:
    report = doctor.collect()
    assert report["fastflow"]["version"] == ff.__version__
    assert report["packages"]["torch"] == metadata.version("torch")
    assert [backend["name"] for backend in report["backends"]] == list(backends.NAMES)
    assert report["backends"][0] == {"name": "reference", "reason": None}
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert (report["gpus"] == []) == (not torch.cuda.is_available())
    assert (report["cpu"]["instructions"] is None) == (backends.unavailable("cpu") is not None)


def test_json_is_the_report(fastflow) -> None:
    result = fastflow("doctor", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(doctor.collect()))


def test_every_refusal_is_shown(fastflow) -> None:
    text = fastflow("doctor").stdout
    for name, reason in backends.report():
        assert name in text
        assert reason is None or reason.split()[0] in text


def test_a_missing_package_is_said(fastflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    lines = [line.split() for line in fastflow("doctor").stdout.splitlines()]
    assert ["no-such-package", "not", "installed"] in lines


def test_doctor_imports_no_extra() -> None:
    import subprocess

    program = (
        "import sys, fastflow.doctor as d; d.collect(); "
        "print(*[n for n in ('diffusers', 'transformers', 'xformers', 'sklearn') if n in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == ""


def test_build_record(tmp_path: Path) -> None:
    record = tmp_path / "_build.json"
    assert doctor.build_record(record) is None
    record.write_text('{"cpu": {"ok": true}}')
    assert doctor.build_record(record) == {"cpu": {"ok": True}}
    record.write_text("{")
    assert "cannot be read" in (doctor.build_record(record) or {})["error"]
    record.write_text("[]")
    assert "holds no record" in (doctor.build_record(record) or {})["error"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "never built here"),
        (
            {"cpu": {"ok": False, "reason": "no C++ compiler found [CXX]"}},
            "cpu was not built: no C++ compiler found [CXX]",
        ),
        ({"cpu": {"ok": True, "instruction_sets": ["avx2"], "compiler": "g++ 12"}}, "cpu for avx2; g++ 12"),
        ({"error": "_build.json cannot be read"}, "error: _build.json cannot be read"),
    ],
)
def test_the_outcome_of_the_build_is_shown(
    fastflow, monkeypatch: pytest.MonkeyPatch, record: dict[str, object] | None, words: str
) -> None:
    monkeypatch.setattr(doctor, "build_record", lambda: record)
    assert words in fastflow("doctor").stdout
