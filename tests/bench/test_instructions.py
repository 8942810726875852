"""`bench instructions`: which way of a kernel is a call's, and what is said where it cannot be counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import cli, gpu_cli, gpu_step, gpu_targets, instructions
from bench.gpu_run import Row
from bench.timing import Times
from fastflow import _env
from fastflow.backends import cuda
from fastflow.compile import nvcc_aot, resources
from fastflow.compile.errors import CompileError


def test_what_a_call_reads_and_writes() -> None:
    shared = {"STS.128": 1, "STS.8": 0}
    assert instructions.accesses(gpu_step.CLEAN) == {"LDG.128": 2, "LDG.64": 4, "STG.128": 4, **shared}
    assert instructions.accesses(gpu_step.NARROW_GIVEN) == {"LDG.64": 6, "LDG.128": 2, "STG.64": 4, **shared}
    assert instructions.accesses(gpu_step.REPLAY) == {"LDG.128": 4, "LDG.64": 4, **shared}
    base, flagged = instructions.accesses(gpu_step.BASE), instructions.accesses(gpu_step.FLAGGED)
    assert flagged == {**base, "STS.8": 1}, "a thread leaves a mark; flags and log-probabilities are written by row"
    assert instructions.step_of(gpu_step.NARROW) == "1, 1, true, true"
    assert instructions.step_of(gpu_step.REPLAY) == "0, 1, false, true"


@pytest.mark.skipif(_env.triton_interpret(), reason="TRITON_INTERPRET is set: kernels are not compiled in this process")
def test_a_step_in_triton(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", minversion="3.6", reason="needs Triton 3.6")
    (drawn, given) = instructions.count("sm_90", ["triton"], (gpu_step.NARROW, gpu_step.NARROW_REPLAY))
    assert (drawn.form, given.form) == (gpu_step.NARROW, gpu_step.NARROW_REPLAY)
    assert 60 < drawn.instructions < 96 and 20 < given.instructions < 30


def test_no_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cuda, "module_path", lambda: None)
    assert cli.main(["instructions", "--backend", "cuda"]) == cli.USAGE
    assert "FASTFLOW_CUDA=1 python setup.py build_ext --inplace" in capsys.readouterr().err


def test_names_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "module_path", lambda: tmp_path / "_cuda.so")
    monkeypatch.setattr(nvcc_aot, "binaries", lambda path, work: [("sm_90", path)])
    monkeypatch.setattr(resources, "disassembled", lambda binary: {"_ZN8fastflow": ""})
    with pytest.raises(CompileError, match=r"names no kernel Step<.*c\+\+filt"):
        instructions.count("sm_90", ["cuda"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--arch", "sm_42"], "'sm_42'"), (["--backend", "cpu"], "backend: wanted triton, cuda or both, by comma, got 'cpu'")],
)  # fmt: skip
def test_bad_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["instructions", *arguments]) == cli.USAGE
    assert words in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_counted_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cuda, "module_path", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert gpu_cli.issued(Console(width=200), torch.device("cuda"), ["cuda"]) == {}
    assert "no instructions are counted for cuda: the CUDA module is not compiled" in capsys.readouterr().out
    assert gpu_cli.issued(Console(), torch.device("cpu"), ["cpu"]) == {}


def test_it_stands_beside_the_share_of_the_copy() -> None:
    ways = gpu_step.ways(gpu_step.NARROW, gpu_step.LARGE, ["cuda"], False, {("cuda", gpu_step.NARROW.name): 82.6})
    assert [way.instructions for way in ways] == [82.6]
    row = Row(
        "step", gpu_step.NARROW.name, gpu_step.LARGE, ways[0].name, "cuda", Times((1e-3,), 0), nbytes=ways[0].nbytes,
        share_of_copy=0.9, instructions=ways[0].instructions,
    )  # fmt: skip
    (verdict,) = gpu_targets.verdicts([row])
    assert "(82.6 instructions an element in its loop): of copy" in verdict.name and verdict.reached
