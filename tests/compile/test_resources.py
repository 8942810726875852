"""Registers, spills and loads are read from compiled code, not guessed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastflow.compile import resources
from fastflow.compile.errors import CompileError

LISTED = """
Resource usage:
 Common:
  GLOBAL:0
 Function calm:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:752 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function wild:
  REG:255 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = {
    "calm": "LDG.E.128 R4, desc[UR4][R2.64]\nLDG.E R1\nLDG.E.64.CONSTANT R8\nLDG.E.U8.STRONG.GPU R1\nLDS.128 R4\nSTG.E.128",
    "wild": "  STL.64 [R1], R2 ;\n  LDL R3, [R1] ;\n  LDG.E.U16 R1",
}
SPILLING = r"""
.version 7.8
.target sm_80
.address_size 64
.visible .entry spilling(.param .u64 p)
{
  .local .align 4 .b8 stack[64];
  .reg .u64 %a, %l, %o;
  .reg .u32 %i, %v;
  ld.param.u64 %a, [p];
  mov.u64 %l, stack;
  mov.u32 %i, %tid.x;
  mul.wide.u32 %o, %i, 4;
  add.u64 %l, %l, %o;
  st.local.u32 [%l], %i;
  ld.local.u32 %v, [%l+4];
  st.global.u32 [%a], %v;
  ret;
}
"""


def test_words_of_the_tools() -> None:
    found = resources.parse(LISTED, CODE)
    calm, wild = found["calm"], found["wild"]
    assert (calm.registers, calm.shared, calm.stack, calm.local_accesses, calm.spills) == (40, 1024, 0, 0, False)
    assert calm.loads == {128: 1, 32: 1, 64: 1, 8: 1} and calm.vector_loads
    assert (wild.registers, wild.stack, wild.local_accesses, wild.spills) == (255, 16, 2, True)
    assert wild.loads == {16: 1} and not wild.vector_loads


def test_a_kernel_with_a_stack_spills(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, which brings ptxas")
    (tmp_path / "spilling.ptx").write_text(SPILLING)
    binary = tmp_path / "spilling.cubin"
    command = [resources.tool("ptxas"), "--gpu-name=sm_80", str(tmp_path / "spilling.ptx"), "-o", str(binary)]
    subprocess.run(command, check=True)
    found = resources.measure(binary)["spilling"]
    assert found.stack >= 64 and found.local_accesses == 2 and found.spills


def test_what_was_compiled(folder: Path, entries: list[dict[str, Any]]) -> None:
    steps = [entry for entry in entries if entry["kernel"] == "step_kernel"]
    assert steps and all(32 <= entry["registers"] <= 128 for entry in steps)
    assert all(entry["loads"]["128"] > 0 for entry in steps), "loads are not vectors"
    assert not any(entry["spills"] or entry["stack"] or entry["local"] for entry in entries)
    assert all(0 < entry["occupancy"] <= 1 for entry in entries)


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs", reason="needs triton 3.4 or newer")
    place = Path(resources.tool("nvdisasm")).parent
    for name in ("ptxas", "cuobjdump", "nvdisasm"):
        assert place.samefile(Path(resources.tool(name)).parent)
    descriptor = type(knobs.nvidia).__dict__["nvdisasm"]
    monkeypatch.setattr(descriptor, "default_path", str(tmp_path / "nvdisasm"))
    with pytest.raises(CompileError, match=r"nvdisasm is missing from the Triton wheel .*TRITON_NVDISASM_PATH"):
        resources.tool("nvdisasm")


def test_a_tool_that_fails_says_why(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, which brings cuobjdump")
    (tmp_path / "x.cubin").write_bytes(b"no code")
    with pytest.raises(CompileError, match="cuobjdump --dump-resource-usage .* failed: "):
        resources.measure(tmp_path / "x.cubin")
    assert shutil.which("cuobjdump-of-nowhere") is None
    with pytest.raises(CompileError, match="`cuobjdump-of-nowhere` cannot be run"):
        resources._run("cuobjdump-of-nowhere")
