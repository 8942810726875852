"""What compiled code takes, read with the tools that NVIDIA ships: cuobjdump for resources, nvdisasm for instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import CompileError

_RESOURCES = re.compile(r"^ *Function (\S+?):\s*\n\s*(REG:.*)$", re.M)
_LOAD = re.compile(r"\bLDG\.E(?:\.\w+)*")
_SPILL = re.compile(r"\b(?:LDL|STL)\b")
_FUNCTION = re.compile(r"^\s*(?:\.text\.(\S+):|//-+ \.text\.(\S+) -+|Function : (\S+))\s*$", re.M)


@dataclass(frozen=True)
class Resources:
    """registers: a thread's; stack, local: bytes a thread; shared: bytes a block, given at compilation (not at launch).

    local_accesses: instructions that load or store spilled registers. loads: {bits: global load instructions}. Both come from
    machine code: 0 and {} where that was not looked at, which takes a third of a compilation's time. What is spilled has a
    place on the stack all the same.
    """

    registers: int
    stack: int
    local: int
    shared: int
    local_accesses: int
    loads: dict[int, int]

    @property
    def spills(self) -> bool:
        """Stack, local memory, or an instruction that uses either."""
        return self.stack > 0 or self.local > 0 or self.local_accesses > 0

    @property
    def vector_loads(self) -> bool:
        """Whether global memory is read by 128 bits at all; rows' scalars are read by 32 or 64 in any kernel."""
        return self.loads.get(128, 0) > 0


def tool(name: str) -> str:
    """Where a tool is: ptxas and the like in the Triton wheel, else on the PATH. Raises CompileError."""
    try:
        from triton import knobs
    except ImportError as error:
        found = shutil.which(name)
        if found is None:
            raise CompileError(
                f'{name} is missing: it comes with Triton 3.4 or newer (pip install "fastflow[triton]") or a CUDA toolkit'
            ) from error
        return found
    try:
        return str(getattr(knobs.nvidia, name).path)
    except RuntimeError as error:
        variable = f"TRITON_{name.upper()}_PATH"
        raise CompileError(
            f"{name} is missing from the Triton wheel ({error}); reinstall triton or name one in {variable}"
        ) from error


def measure(binary: Path, sass: bool = True) -> dict[str, Resources]:
    """Function -> resources of a cubin; sass: of its machine code too. Raises CompileError where a tool is missing or fails."""
    listed = _run(tool("cuobjdump"), "--dump-resource-usage", str(binary))
    found = parse(listed, disassembled(binary) if sass else {})
    if not found:
        raise CompileError(f"cuobjdump lists no function in {binary}")
    return found


def disassembled(binary: Path) -> dict[str, str]:
    """Function -> machine code of a cubin, in words. Raises CompileError where the tool is missing or fails."""
    return _functions(_run(tool("nvdisasm"), "-c", "-ndf", str(binary)))


def parse(listed: str, code: dict[str, str]) -> dict[str, Resources]:
    """Function -> resources, from the words of cuobjdump and each function's instructions."""
    found = {}
    for name, line in _RESOURCES.findall(listed):
        numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        text = code.get(name, "")
        loads: dict[int, int] = {}
        for instruction in _LOAD.findall(text):
            width = re.search(r"\.(U8|S8|U16|S16|64|128|256)\b", instruction)
            bits = int(re.sub(r"\D", "", width[1])) if width else 32
            loads[bits] = loads.get(bits, 0) + 1
        found[name] = Resources(
            numbers["REG"], numbers["STACK"], numbers["LOCAL"], numbers["SHARED"], len(_SPILL.findall(text)), loads
        )
    return found


def _functions(text: str) -> dict[str, str]:
    """A disassembly cut into its functions."""
    marks = [(match.start(), next(filter(None, match.groups()))) for match in _FUNCTION.finditer(text)]
    ends = [start for start, _ in marks[1:]] + [len(text)]
    found: dict[str, str] = {}
    for (start, name), end in zip(marks, ends, strict=True):
        found[name] = found.get(name, "") + text[start:end]
    return found


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise CompileError(f"`{command[0]}` cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        raise CompileError(f"`{' '.join(command)}` failed: {error.stderr.strip() or error.stdout.strip()}") from error
