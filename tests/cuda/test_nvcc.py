"""What nvcc is told, and how its answer is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastflow import _nvcc

ANSWER = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Zone' for 'sm_90'
ptxas info    : Function properties for _Zone
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 19520 bytes smem
ptxas info    : Compiling entry function '_Ztwo' for 'sm_120'
ptxas info    : Function properties for _Ztwo
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""


def test_resources() -> None:
    assert _nvcc.parse_resources(ANSWER) == [
        _nvcc.Resources("_Zone", "90", 64, 19520, 16, 12),
        _nvcc.Resources("_Ztwo", "120", 30, 0, 0, 0),
    ]


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("90", ["90"]),
        ("8.0;9.0+PTX", ["80", "90+PTX"]),
        ("sm_80, sm_120", ["80", "120"]),
        ("10.0a", ["100a"]),
        ("80-virtual", ["80-virtual"]),
    ],
)
def test_architectures(text: str, archs: list[str]) -> None:
    assert _nvcc.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["hopper", "75", "9", ""])
def test_architectures_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match='FASTFLOW_CUDA_ARCHS: wanted names like "80;90"'):
        _nvcc.parse_archs(text)


def test_code_options() -> None:
    assert _nvcc.code_options(["80", "89", "120+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_89",
        "-gencode=arch=compute_90,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert _nvcc.code_options(["90+PTX", "80-virtual"]) == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_what_a_module_says_that_it_holds() -> None:
    assert _nvcc.held(["90", "120+PTX", "80-virtual"]) == (["sm_90", "sm_120"], ["compute_80", "compute_120"])
    assert "-DFASTFLOW_ARCHS=sm_90+compute_80" in _nvcc.flags(["90", "80-virtual"])


def test_every_build_is_without_contraction() -> None:
    for command in (
        _nvcc.command("nvcc", Path("root"), Path("out.o"), ["90"]),
        _nvcc.ptx_command("nvcc", Path("root"), Path("out.ptx"), "90"),
        _nvcc.cubin_command("nvcc", Path("in.ptx"), Path("out.cubin"), "90"),
    ):
        assert {"-fmad=false", "-prec-sqrt=true", "-prec-div=true", "-ftz=false"} <= set(command)


def test_nvcc_of_a_toolkit_comes_first(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert _nvcc.find(str(tmp_path)) == str(nvcc)


def test_it_needs_nothing_of_the_package() -> None:
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); print({'torch', 'fastflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program, _nvcc.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
