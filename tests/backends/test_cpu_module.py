"""Loading the compiled module: one OpenMP runtime, and words where it is absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastflow.backends import cpu

PROGRAM = r"""
import re, torch, fastflow as ff
torch.set_num_threads(2)
sigmas = ff.sigma_schedule(4)
x = torch.randn(4, 65536)
ff.step(x, x, ff.FlowSDE(0.7).transitions(sigmas).at(1), noise=ff.Noise([1, 2, 3, 4]), backend="cpu")
maps = open("/proc/self/maps").read()
print(len(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[^/\s]*", maps))))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_one_openmp_runtime(module: Any) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """unavailable() of a package without the module, beside a build record that the test writes."""

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'fastflow._cpu'")

    def answer(record: dict[str, Any] | None) -> str:
        if record is not None:
            (tmp_path / "_build.json").write_text(json.dumps(record))
        return str(cpu.unavailable.__wrapped__())

    monkeypatch.setattr(cpu, "_module", missing)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "backends" / "cpu.py"))
    return answer


def test_absent_and_never_built(absent: Any) -> None:
    assert "build_ext --inplace" in absent(None)


def test_absent_with_the_reason_of_the_build(absent: Any) -> None:
    assert "no C++ compiler found" in absent({"cpu": {"ok": False, "reason": "no C++ compiler found"}})


def test_absent_though_built(absent: Any) -> None:
    assert "install again" in absent({"cpu": {"ok": True, "reason": None}})
