"""How the CUDA sources are compiled: the one place for flags, sources and architectures. Standard library only, nothing of the
package: setup.py runs this file by its path, before fastflow or torch can be imported.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

KERNELS = "csrc/cuda/kernels.cu"  # every kernel, and the launches; from the root of the sources
BINDING = "csrc/cuda/binding.cpp"

# Products and sums round on their own, divisions and roots are IEEE, subnormal numbers stay what they are.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-prec-sqrt=true", "-prec-div=true", "-ftz=false")
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off")

# What is compiled where neither a GPU nor the user says better. Code for an architecture runs on later ones of the same
# first digit; PTX is compiled by the driver of a GPU of the future.
ARCHS = ("80", "90", "100", "120")
TESTED_ARCHS = ("80", "89", "90", "100", "120")


def find(cuda_home: str | None = None) -> str | None:
    """nvcc: in `cuda_home`, on the PATH, or in /usr/local/cuda; None if it is nowhere."""
    beside = [str(Path(cuda_home) / "bin" / "nvcc")] if cuda_home else []
    for candidate in (*beside, "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate)
        if found is not None:
            return found
    return None


def version(nvcc: str) -> str:
    """As "13.0"; "unknown" where nvcc says nothing of the kind."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else "unknown"


def home(nvcc: str) -> Path:
    """The toolkit that an nvcc belongs to, by its own words."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", "/dev/null"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.M)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent


def static_runtime(nvcc: str) -> Path | None:
    """libcudart_static.a of an nvcc's toolkit, which needs no CUDA library at run time; None if it is not there."""
    top = home(nvcc)
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (top / folder / "libcudart_static.a").exists():
            return top / folder / "libcudart_static.a"
    return None


def local_archs() -> list[str]:
    """Compute capabilities of the GPUs of this machine, as "90"; empty without nvidia-smi or a GPU."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^(\d+)\.(\d)\s*$", done.stdout, re.M) if done.returncode == 0 else []
    return sorted({major + minor for major, minor in found if int(major) >= 8}, key=int)


def parse_archs(text: str) -> list[str]:
    """ "90", "8.0;9.0", "sm_80,sm_90+PTX" -> ["80", "90+PTX"]; "80-virtual" is PTX alone. Raises ValueError for others."""
    archs = []
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d)([af]?)(\+PTX|-virtual)?", word, re.I)
        if match is None or int(match[1]) < 8:
            raise ValueError(
                f'FASTFLOW_CUDA_ARCHS: wanted names like "80;90" or "8.0;9.0+PTX", 8.0 or newer, got {text!r}'
            )
        more = {"": "", "+": "+PTX", "-": "-virtual"}[(match[4] or "")[:1]]
        archs.append(match[1] + match[2] + match[3].lower() + more)
    return archs


def default_archs(nvcc: str) -> list[str]:
    """ARCHS as far as an nvcc knows them, and PTX."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in ARCHS if f"compute_{arch}" in known]
    return [*archs[:-1], *(f"{arch}+PTX" for arch in archs[-1:])]


def virtual(arch: str) -> str:
    """What an architecture's machine code is made from: the kernels wait for one another by instructions of 9.0 and later."""
    return "90" if int(re.sub(r"\D", "", arch)) >= 90 else "80"


def code_options(archs: Iterable[str]) -> list[str]:
    """-gencode options: "90" is machine code, "90+PTX" that and the arch's own PTX, "90-virtual" the PTX alone."""
    machine, ptx = held(archs)
    options = [f"-gencode=arch=compute_{virtual(name)},code={name}" for name in machine]
    return [*options, *(f"-gencode=arch={name},code={name}" for name in ptx)]


def held(archs: Iterable[str]) -> tuple[list[str], list[str]]:
    """What such names ask for: machine code as ["sm_80"], and PTX as ["compute_80"], oldest first."""
    machine, ptx = [], []
    for arch in archs:
        name = arch.removesuffix("+PTX").removesuffix("-virtual")
        if not arch.endswith("-virtual"):
            machine.append(f"sm_{name}")
        if name != arch:
            ptx.append(f"compute_{name}")
    return list(dict.fromkeys(machine)), sorted(set(ptx), key=lambda name: (len(name), name))


def flags(archs: Sequence[str]) -> list[str]:
    """All of nvcc's flags for object code."""
    host = [f"-Xcompiler={flag}" for flag in HOST_FLAGS]
    machine, ptx = held(archs)
    return [*FLAGS, *host, *code_options(archs), f"-DFASTFLOW_ARCHS={'+'.join(machine + ptx)}"]


def command(nvcc: str, root: Path, output: Path, archs: Sequence[str], *more: str) -> list[str]:
    """Compiles every kernel into one object file. `root`: the folder of csrc/."""
    return [nvcc, *flags(archs), *more, "-c", str(root / KERNELS), "-o", str(output)]


def ptx_command(nvcc: str, root: Path, output: Path, architecture: str) -> list[str]:
    """Compiles every kernel to PTX for a virtual architecture, "80" or "90"."""
    return [nvcc, *FLAGS, f"-arch=compute_{architecture}", "-ptx", str(root / KERNELS), "-o", str(output)]


def cubin_command(nvcc: str, ptx: Path, output: Path, arch: str) -> list[str]:
    """Assembles such PTX for one GPU, and says what each kernel takes: see parse_resources."""
    code = f"-gencode=arch=compute_{virtual(arch)},code=sm_{arch}"
    return [nvcc, *FLAGS, code, "-Xptxas=-v", "-cubin", str(ptx), "-o", str(output)]


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture, by `-Xptxas -v`."""

    kernel: str  # the mangled name
    arch: str
    registers: int
    shared: int  # bytes of a block
    stack: int  # bytes of a thread in local memory
    spills: int  # bytes stored and loaded


def parse_resources(text: str) -> list[Resources]:
    """The kernels of `nvcc -Xptxas -v`'s standard error, in its order."""
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    found = []
    for name, arch, stack, stores, loads, registers, rest in re.findall(pattern, text, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        found.append(Resources(name, arch, int(registers), int(shared[1]) if shared else 0, int(stack), spills))
    return found
