"""Builds the CUDA module for a list of architectures with the project's own builder, and reads what its kernels take."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import _env, _nvcc
from .cache import MANIFEST
from .errors import CompileError
from .module import ROOT, SUFFIX, fingerprint, stamp
from .resources import measure, tool
from .targets import PTX, Target, find

# The builder of setup.py, for this module alone: its flags, its compiler, its words.
_BUILDER = """
import sys, setuptools
from distutils.core import run_setup
project = run_setup("setup.py", stop_after="init")
project.ext_modules = [module for module in project.ext_modules if module.name == "fastflow._cuda"]
command = project.get_command_obj("build_ext")
command.build_lib, command.build_temp = sys.argv[1:]
project.run_command("build_ext")
"""


def find_nvcc() -> str:
    """Where nvcc is. Raises CompileError if it is nowhere."""
    found = _nvcc.find(_env.cuda_home())
    if found is None:
        raise CompileError(
            "nvcc is missing: looked in CUDA_HOME, on the PATH and in /usr/local/cuda; install a CUDA toolkit, or leave the "
            "CUDA half out with `--backend triton`"
        )
    return found


def build(targets: list[Target], folder: Path, sass: bool = True) -> list[dict[str, Any]]:
    """Compiles for every target, and PTX of compute_80 and compute_120 for other GPUs; an entry a kernel and target.
    sass: look at machine code.

    Raises CompileError.
    """
    if not (ROOT / _nvcc.KERNELS).is_file():
        raise CompileError(
            "csrc/ is not part of an installed fastflow, and the CUDA module is compiled from it; run this in a checkout, or "
            "leave the CUDA half out with `--backend triton`"
        )
    nvcc = find_nvcc()
    tool("cuobjdump"), tool("nvdisasm")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    unknown = [target.name for target in targets if target.plain not in known]
    if unknown:
        raise CompileError(f"--arch: {nvcc} does not know {', '.join(unknown)}; it knows {', '.join(known)}")
    unknown = [name for name in PTX if name.replace("compute", "sm") not in known]
    if unknown:
        raise CompileError(
            f"PTX of {' and '.join(PTX)} is embedded for other GPUs, and {nvcc} does not know {', '.join(unknown)}; set "
            "CUDA_HOME to a toolkit of 12.8 or newer, or leave the CUDA half out with `--backend triton`"
        )
    place = folder / "cuda"
    place.mkdir(parents=True, exist_ok=True)
    (place / MANIFEST).unlink(missing_ok=True)  # what is half written is no cache
    with tempfile.TemporaryDirectory() as work:
        archs = archs_of(targets)
        made = _run_builder(Path(work), archs)
        entries = _measure(made, Path(work), sass)
        module = place / made.name
        shutil.move(made, module)
    machine, ptx = _nvcc.held(archs)
    manifest = fingerprint() | stamp(module) | {"nvcc": _nvcc.version(nvcc), "archs": machine, "ptx": ptx}
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return entries


def archs_of(targets: list[Target]) -> list[str]:
    """What the builder is asked for: "90", or "80+PTX"; "80-virtual", its PTX alone, where it is no target."""
    names = [target.name.removeprefix("sm_") for target in targets]
    virtual = [name.removeprefix("compute_") for name in PTX]
    asked = [f"{name}+PTX" if name in virtual else name for name in names]
    return asked + [f"{name}-virtual" for name in virtual if name not in names]


def contents(targets: list[Target]) -> str:
    """What the module holds, in words."""
    machine, ptx = _nvcc.held(archs_of(targets))
    return f"code for {', '.join(machine)}, and PTX of {' and '.join(ptx)} for other GPUs"


def _run_builder(work: Path, names: list[str]) -> Path:
    """Runs setup.py's build of the module; the file."""
    settings = ["FASTFLOW_BUILD=require", "FASTFLOW_CUDA=1", f"FASTFLOW_CUDA_ARCHS={';'.join(names)}"]
    command = ["env", *settings, sys.executable, "-c", _BUILDER, str(work / "lib"), str(work / "temp")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    made = list((work / "lib").rglob(f"_cuda{SUFFIX}"))
    if done.returncode != 0 or not made:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise CompileError(f"the CUDA module was not built: {lines[-1] if lines else 'the builder said nothing'}")
    return made[0]


def binaries(module: Path, work: Path) -> list[tuple[str, Path]]:
    """(architecture, cubin) of all that a module holds, in order, written to `work`. Raises CompileError."""
    done = subprocess.run([tool("cuobjdump"), "-xelf", "all", str(module)], cwd=work, capture_output=True, text=True)
    found = [
        (match[1], path) for path in work.glob("*.cubin") if (match := re.search(r"\.(sm_\w+)\.cubin$", path.name))
    ]
    if not found:
        raise CompileError(f"cuobjdump finds no code in {module.name}: {done.stderr.strip() or done.stdout.strip()}")
    return sorted(found, key=lambda binary: find(binary[0]).number)


def _measure(module: Path, work: Path, sass: bool) -> list[dict[str, Any]]:
    """An entry for each kernel and architecture in a module, in order of the architectures."""
    entries = []
    for arch, path in binaries(module, work):
        target, found, threads = find(arch), measure(path, sass), _threads(path)
        for (name, resources), (kernel, variant) in zip(found.items(), names(list(found)), strict=True):
            shared = resources.shared
            if target.number >= 90 and shared:
                shared -= 1024  # cuobjdump counts the block's reserve from there on
            warps = threads.get(name, 1024) // 32
            entries.append(
                {"backend": "cuda", "arch": arch, "kernel": kernel, "variant": variant, "warps": warps}
                | asdict(resources)
                | {"shared": shared, "spills": resources.spills}
                | {"occupancy": target.occupancy(resources.registers, warps, shared)}
            )
    return entries


def _threads(binary: Path) -> dict[str, int]:
    """Function -> threads of a block, as its launch bounds say."""
    text = subprocess.run([tool("cuobjdump"), "-elf", str(binary)], capture_output=True, text=True).stdout
    pattern = r"^\.nv\.info\.(\S+)(?:(?!^\.nv\.).)*?EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+0x([0-9a-f]+)"
    return {name: int(value, 16) for name, value in re.findall(pattern, text, re.M | re.S)}


def names(mangled: list[str]) -> list[tuple[str, str]]:
    """("Step", "3, 3, true, false") of kernel<fastflow::Step<3, 3, true, false>>; what c++filt cannot read stays as it is."""
    if shutil.which("c++filt") is None:
        return [(name, "") for name in mangled]
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True).stdout
    found = []
    for name, line in zip(mangled, text.splitlines(), strict=True):
        match = re.search(r"kernel<(?:fastflow::)?(\w+)(?:<(.*?) ?>)? ?>", line)
        found.append((match[1], match[2] or "") if match else (name, ""))
    return found
