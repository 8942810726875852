"""The kernels compile for NVIDIA GPUs, without spills and without contracted arithmetic. No GPU needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from bench import gpu_step, instructions
from fastflow import _nvcc
from fastflow.compile import resources
from fastflow.compile.errors import CompileError
from tests.cuda.conftest import ROOT

NVCC = _nvcc.find()
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
KERNELS = 40
ARCHS = pytest.mark.parametrize("arch", _nvcc.TESTED_ARCHS)


def run(command: list[str]) -> str:
    """Standard output and error of a command that succeeds."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def known(arch: str) -> bool:
    return f"compute_{arch}" in run([str(NVCC), "--list-gpu-arch"])


@pytest.fixture(scope="session")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """PTX of all kernels, by virtual architecture; compiled once."""
    folder = tmp_path_factory.mktemp("ptx")

    @cache
    def compiled(virtual: str) -> Path:
        run(_nvcc.ptx_command(str(NVCC), ROOT, folder / f"{virtual}.ptx", virtual))
        return folder / f"{virtual}.ptx"

    return compiled


@pytest.fixture(scope="session")
def assembled(ptx: Callable[[str], Path]) -> Callable[[str], tuple[Path, list[_nvcc.Resources]]]:
    """Machine code of all kernels, and what they take, by architecture; assembled once."""

    @cache
    def compiled(arch: str) -> tuple[Path, list[_nvcc.Resources]]:
        if not known(arch):
            pytest.skip(f"nvcc {_nvcc.version(str(NVCC))} knows no sm_{arch}")
        source = ptx(_nvcc.virtual(arch))
        output = source.with_name(f"sm_{arch}.cubin")
        return output, _nvcc.parse_resources(run(_nvcc.cubin_command(str(NVCC), source, output, arch)))

    return compiled


@cache
def disassembler() -> str | None:
    """cuobjdump: on the PATH, beside nvcc, or in Triton's package, which carries one."""
    beside = Path(str(NVCC)).resolve().parent / "cuobjdump"
    places = [shutil.which("cuobjdump"), str(beside)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((place for place in places if place is not None and Path(place).exists()), None)


@cache
def machine_code(cubin: Path) -> dict[str, str]:
    """Machine code by kernel: "Step<0, 1, true, true>"."""
    tool = disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump")
    done = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this cuobjdump cannot read it: {done.stderr.strip()[:200]}")
    return {short(part.split("\n", 1)[0]): part for part in re.split(r"\n\s+Function : ", done.stdout)[1:]}


def short(mangled: str) -> str:
    """A kernel's program: ...kernelINS_4StepILi0ELi1ELb1ELb1EEE... -> "Step<0, 1, 1, 1>"."""
    found = re.search(r"kernelINS_\d+([A-Z][A-Za-z]+?)(?:I((?:L[ib]\d+E)+)E)?E", mangled)
    assert found is not None, mangled
    numbers = re.findall(r"L[ib](\d+)E", found[2] or "")
    return f"{found[1]}<{', '.join(numbers)}>" if numbers else found[1]


@ARCHS
def test_nothing_spills(arch: str, assembled: Callable[[str], tuple[Path, list[_nvcc.Resources]]]) -> None:
    listed = assembled(arch)[1]
    assert len(listed) == KERNELS
    for kernel in listed:
        name = short(kernel.kernel)
        assert (kernel.spills, kernel.stack) == (0, 0), f"{name} on sm_{arch}: {kernel}"
        wide = re.match(r"Matching\w+<3|(Gradient|RowTiles)<0, 0", name)  # all that a thread reads may be float32
        hot = re.match(r"(Step|Matching\w+|Gradient|RowTiles)<[01]", name)
        most = 80 if wide else 64 if hot else 128
        assert kernel.registers <= most, f"{name} on sm_{arch} keeps too few blocks resident: {kernel}"


@ARCHS
def test_machine_code_has_no_local_memory(
    arch: str, assembled: Callable[[str], tuple[Path, list[_nvcc.Resources]]]
) -> None:
    for name, code in machine_code(assembled(arch)[0]).items():
        assert not re.findall(r"\b(?:LDL|STL)\b", code), name


@pytest.mark.parametrize("virtual", ["80", "90"])
def test_nothing_is_contracted_in_ptx(virtual: str, ptx: Callable[[str], Path]) -> None:
    """Products and sums are marked .rn, which the assembler never contracts; roots and divisions are IEEE. The only fused
    operations stand in the program: two after each approximate reciprocal root, which make it the IEEE root. Those in float64
    are of the exp of a policy loss."""
    text = ptx(virtual).read_text()
    plain = re.findall(r"\b(?:add|sub|mul|mad)\.(?!rn\.)\S*f(?:32|64)\b", text)
    assert not plain, plain[:3]
    assert not re.findall(r"\bmad\.\S*f32|\b(?:div|sqrt)\.(?!rn\.f(?:32|64))\S+|\bfma\.(?!rn\.f32)\S*f32", text)
    assert {short(part) for part in text.split(".entry ")[1:] if "fma.rn.f64" in part} == {"PolicyRows"}
    assert len(re.findall(r"\brsqrt\.approx\.ftz\.f32", text)) * 2 == len(re.findall(r"\bfma\.rn\.f32", text)) > 0
    assert not re.findall(r"\b\w+\.\S*ftz\S*", re.sub(r"rsqrt\.approx\.ftz", "", text)), "subnormal numbers are flushed"


@ARCHS
def test_fused_operations_in_machine_code_stand_in_roots_and_divisions(
    arch: str, assembled: Callable[[str], tuple[Path, list[_nvcc.Resources]]]
) -> None:
    """An IEEE root or division is made of a reciprocal (MUFU) and fused operations. Programs that have neither have none, and
    drawing adds a reciprocal root and two fused operations for each of its four roots to a program, nothing else."""
    code = machine_code(assembled(arch)[0])

    def count(name: str, operation: str) -> int:
        return len(re.findall(rf"\s{operation}[. ]", code[name]))

    for name in ("RowTiles<3, 3, 0>", "RowTiles<0, 1, 2>", "RowTiles<3, 3, 2>", "CountTiles", "FinishRows<3>"):
        assert count(name, "FFMA") == 0, name
    for dtypes in ("0, 0", "0, 1", "1, 1"):
        for guided in (0, 1):
            drawn, read = f"Step<{dtypes}, 1, {guided}>", f"Step<{dtypes}, 0, {guided}>"
            assert count(drawn, r"MUFU\.RSQ") - count(read, r"MUFU\.RSQ") == 4
            assert count(drawn, "FFMA") - count(read, "FFMA") == 8
    for name in ("MatchingTiles<0, 1>", "MatchingTiles<3, 3>"):
        assert count(name, "FFMA") == 2 * count(name, r"MUFU\.RSQ") > 0, name


@ARCHS
def test_the_root_has_the_steps_of_the_compilers_own(arch: str, tmp_path: Path) -> None:
    """The fast path of an IEEE root, which the compiler takes for 2^-100 <= x <= 2^100, is the one that the noise takes."""
    if not known(arch):
        pytest.skip(f"nvcc {_nvcc.version(str(NVCC))} knows no sm_{arch}")
    source = (
        f'#include "{ROOT}/csrc/cuda/block.h"\n'
        "__global__ void compilers(float* x) { *x = __fsqrt_rn(*x); }\n"
        "__global__ void ours(float* x) { *x = fastflow::Lane::root(*x); }\n"
    )
    (tmp_path / "root.cu").write_text(source)
    command = [str(NVCC), *_nvcc.FLAGS, *_nvcc.code_options([arch]), "-cubin"]
    run([*command, str(tmp_path / "root.cu"), "-o", str(tmp_path / "root.cubin")])
    tool = disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump")
    parts = re.split(r"\n\s+Function : ", run([tool, "-sass", str(tmp_path / "root.cubin")]))[1:]
    steps = {}
    for part in parts:
        lines = re.findall(r"\s((?:MUFU|FMUL|FFMA)[^;]*);", part)
        start = next(i for i, line in enumerate(lines) if line.startswith("MUFU.RSQ"))
        steps["ours" if "ours" in part.split("\n", 1)[0] else "compilers"] = dataflow(lines[start : start + 5])
    assert steps["ours"] == steps["compilers"]


def dataflow(lines: list[str]) -> list[str]:
    """Instructions with registers named by the step that made them, sums and products in one order."""
    made: dict[str, str] = {}
    result = []
    for number, line in enumerate(lines):
        operation, operands = line.replace(".reuse", "").replace(".FTZ", "").strip().split(None, 1)
        target, *sources = (word.strip() for word in operands.split(","))
        named = [re.sub(r"R\d+", lambda m: made.get(m[0], "x"), source) for source in sources]
        if operation in ("FMUL", "FFMA"):
            sign = "-" * (sum(name.startswith("-") for name in named[:2]) % 2)
            named[:2] = [sign, *sorted(name.lstrip("-") for name in named[:2])]
        result.append(f"{operation} {named}")
        made[target] = f"step{number}"
    return sorted(result)


@ARCHS
def test_quads_are_read_and_written_at_once(
    arch: str, assembled: Callable[[str], tuple[Path, list[_nvcc.Resources]]]
) -> None:
    for name, code in machine_code(assembled(arch)[0]).items():
        reads = len(re.findall(r"LDG\.E\.128|LDG\.E\.ENL2\.128", code))
        if name.startswith("Step<0, 0"):
            assert reads >= (6 if name.endswith(", 1>") else 4), f"{name}: {reads} reads of 16 bytes"
        if name.startswith("Gradient") and "1, 1" not in name:
            assert reads >= (4 if "0, 1" in name else 12), f"{name}: {reads} reads of 16 bytes"
        if name.startswith("Matching"):
            assert reads >= (2 if "<0" in name else 6), f"{name}: {reads} reads of 16 bytes"
        if name.startswith(("Step", "Gradient<0, 0", "Gradient<3", "MatchingGradient<3")):
            assert len(re.findall(r"STG\.E\.128", code)) >= 2, name


@ARCHS
def test_a_thread_reads_its_quads_before_it_uses_one(
    arch: str, assembled: Callable[[str], tuple[Path, list[_nvcc.Resources]]]
) -> None:
    """Two quads of each input that a call may have. Without dtypes, each stands there for 64 bits and for 128."""
    code = machine_code(assembled(arch)[0])
    inputs = {"Gradient": 6, "RowTiles<0, 0, 2>": 7, "RowTiles<0, 1, 2>": 7, "RowTiles<1, 1, 2>": 7}
    inputs |= {"Gradient<3": 14, "RowTiles<3, 3, 0": 4, "RowTiles<3, 3, 1": 14, "RowTiles<3, 3, 2": 14}
    for name in code:
        wanted = 2 * max((count for start, count in inputs.items() if name.startswith(start)), default=0)
        assert reads_at_once(code[name]) >= wanted, f"{name} on sm_{arch}: wanted {wanted} reads before one is used"


def reads_at_once(code: str) -> int:
    """The most reads of 64 or 128 bits in a row, as the code stands, before an instruction takes what one of them brought."""
    most = found = 0
    awaited: set[int] = set()
    for operation, operands in re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", code):
        target, _, sources = operands.partition(",")
        used = operands if operation.startswith("ST") else sources
        if awaited & {int(number) for number in re.findall(r"\bR(\d+)", used)}:
            found, awaited = 0, set()
        made = re.match(r"R(\d+)", target)
        wide = re.match(r"LDG\b.*\.(64|128)$", operation.removesuffix(".CONSTANT"))
        if made and wide:
            awaited |= set(range(int(made[1]), int(made[1]) + int(wide[1]) // 32))
            found += 1
            most = max(most, found)
        elif made:
            awaited.discard(int(made[1]))
    return most


def test_the_launches_compile(tmp_path: Path) -> None:
    """The host's half of the file, which PTX leaves out; flags and sources as in a build, but without machine code."""
    run([*_nvcc.command(str(NVCC), ROOT, tmp_path / "kernels.o", []), "-gencode=arch=compute_90,code=compute_90"])
    assert (tmp_path / "kernels.o").stat().st_size > 0


def test_later_kernels_wait_for_earlier_ones(ptx: Callable[[str], Path]) -> None:
    assert len(re.findall(r"griddepcontrol\.wait", ptx("90").read_text())) == KERNELS
    assert "griddepcontrol" not in ptx("80").read_text()


@ARCHS
def test_noise_leaves_room_for_bandwidth(
    arch: str, assembled: Callable[[str], tuple[Path, list[_nvcc.Resources]]]
) -> None:
    """A step on bfloat16 states that draws its noise has about 84 slots an element on an H200 while it moves its bytes; of
    the loop alone, to which what a block does before and after adds."""
    try:
        listed = resources.disassembled(assembled(arch)[0])
    except CompileError as error:
        pytest.skip(f"needs an nvdisasm that can read it: {error}")
    code = {short(name): text for name, text in listed.items()}
    for form in gpu_step.FORMS:
        kernel = instructions.step_of(form).replace("true", "1").replace("false", "0")
        found = instructions.of_step(code[f"Step<{kernel}>"], form)
        least, most = (60, 84 if form.sample == torch.bfloat16 else 86) if form.noise == "counter" else (20, 42)
        assert least < found <= most, f"{form.name} on sm_{arch}: {found} instructions an element"
