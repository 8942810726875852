"""What `make` does on an NVIDIA GPU: every part has its time, and none keeps the others from running. No GPU needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.repository import ROOT

COMPILING = 65  # seconds, both modules for the one architecture of the GPU at hand, on two cores
KILLING = 10  # a part may take so long after its timeout
LIMIT = 9 * 60
KERNELS = {"triton", "cuda"}  # folders of tests whose devices are found at run time
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CALLS = re.compile(r"run (\S+) \$\(call (BENCH|TEST)_GPU,(\d+),([^\n]*)\);")


def parts(kind: str) -> dict[str, tuple[int, str]]:
    """Name -> (seconds until the timeout, arguments) of each part of bench-gpu or test-gpu."""
    return {name: (int(seconds), words) for name, of, seconds, words in CALLS.findall(MAKEFILE) if of == kind}


@pytest.mark.parametrize(("kind", "count"), [("BENCH", 6), ("TEST", 2)])
def test_the_parts_leave_time_to_compile(kind: str, count: int) -> None:
    assert len(parts(kind)) == count
    late = KILLING * len(parts(kind)) if kind == "TEST" else 0
    assert sum(seconds for seconds, _ in parts(kind).values()) + late + COMPILING <= LIMIT


def test_a_benchmark_has_time_to_end_what_it_began() -> None:
    for seconds, words in parts("BENCH").values():
        begun = re.search(r"--seconds (\d+)", words)
        assert begun is not None and int(begun[1]) + 10 <= seconds
    assert "9 minutes at most, compiling included" in MAKEFILE


def test_every_folder_with_tests_of_a_gpu_is_run_there() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    marked = {
        path.relative_to(ROOT / "tests").parts[0] for path, text in texts.items() if re.search(r"mark\.gpu\b", text)
    }
    named = {name: set(re.findall(r" tests/(\w+)(?![\w/])", f" {words}")) for name, (_, words) in parts("TEST").items()}
    assert named["kernels"] == KERNELS and marked <= named["rollouts"] | KERNELS
    assert list(named) == ["kernels", "rollouts"]
    assert "-m gpu" in parts("TEST")["rollouts"][1] and "-m gpu" not in parts("TEST")["kernels"][1]


PARTS = {
    "test-gpu": list(parts("TEST")),
    "bench-gpu": list(parts("BENCH")),
    "sanitize-gpu": ["memcheck", "racecheck"],
}
FAILING = [
    ("test-gpu", "nothing", []),
    ("test-gpu", "triton", ["kernels"]),
    ("test-gpu", "rewards", ["rollouts"]),
    ("bench-gpu", "nothing", []),
    ("bench-gpu", "step", ["step"]),
    ("bench-gpu", "rollout", ["sd3.5", "flux"]),
    ("sanitize-gpu", "nothing", []),
    ("sanitize-gpu", "memcheck", ["memcheck"]),
]


@pytest.mark.skipif(not all(map(shutil.which, ("make", "timeout"))), reason="needs make and timeout")
@pytest.mark.parametrize(("target", "word", "wrong"), FAILING)
def test_all_parts_run_and_one_that_fails_fails_the_whole(
    target: str, word: str, wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run by a script in place of Python and the sanitizer, which keeps its arguments and fails for those that hold a word."""
    stub, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *{word}*) exit 3;; esac\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    settings = ["GPU=1", "PYTHON=true", f"GPU_RUN={stub}", "GPU_SPREAD=-n 8", f"RESULTS={tmp_path}"]
    done = subprocess.run(
        ["make", "-o", "build/gpu.stamp", target, *settings], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert len(log.read_text().splitlines()) == len(PARTS[target])
    assert re.findall(r"^== (\S+)$", done.stdout, re.M) == PARTS[target]
    assert (done.returncode != 0) == bool(wrong)
    assert not wrong or f"make: not all went well: {' '.join(wrong)}\n" in done.stdout


def test_every_sanitizer_has_its_time() -> None:
    assert re.findall(r"timeout (\d+) compute-sanitizer", MAKEFILE) == ["500"]
