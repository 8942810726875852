"""`make bench-gpu` ends in nine minutes, with the CUDA module compiled in the same call."""

from __future__ import annotations

import re

from tests.packaging.repository import ROOT

COMPILING = 100  # seconds, for the one architecture of the GPU at hand


def test_the_parts_leave_time_to_compile() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    parts = [int(seconds) for seconds in re.findall(r"\$\(call BENCH_GPU,(\d+),", text)]
    assert len(parts) == 6 and sum(parts) + COMPILING < 9 * 60
    for timeout, measured in re.findall(r"\$\(call BENCH_GPU,(\d+),[^)]*--seconds (\d+)", text):
        assert int(measured) + 10 <= int(timeout)  # importing torch, and the check of a benchmark's values
    assert "9 minutes at most, compiling included" in text
