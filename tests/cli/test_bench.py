"""`fastflow bench` hands over to bench/ where there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastflow.cli import bench


def test_without_a_checkout_it_says_so(fastflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "checkout", lambda: None)
    result = fastflow("bench", "step")
    assert result.exit_code == 2
    assert "there is no bench/ beside this installation" in result.stderr
    assert "clone the repository" in result.stderr


def test_everything_after_the_name_is_passed_on(fastflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def call(command: list[str], cwd: Path) -> int:
        calls.append((command, cwd))
        return 3

    monkeypatch.setattr(bench, "checkout", lambda: tmp_path)
    monkeypatch.setattr(subprocess, "call", call)
    assert fastflow("bench", "step", "--sizes", "4", "--help").exit_code == 3
    assert calls == [([sys.executable, "-m", "bench", "step", "--sizes", "4", "--help"], tmp_path)]


def test_this_checkout_has_a_bench() -> None:
    root = bench.checkout()
    assert root is not None
    assert (root / "bench").is_dir()
