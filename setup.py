"""Compiles csrc/ with ninja. A failed build is no failed install: the package then runs without compiled modules.

FASTFLOW_BUILD=0 skips compilation, FASTFLOW_BUILD=require makes a failure fatal, CXX names the compiler. The CUDA module is
compiled for the GPUs that nvidia-smi finds. FASTFLOW_CUDA=1 compiles it without a GPU too, FASTFLOW_CUDA=0 never, and
FASTFLOW_CUDA_ARCHS="80;90" names what for; nvcc is looked for in CUDA_HOME, on the PATH and in /usr/local/cuda. The outcome
is recorded in fastflow/_build.json, which `fastflow doctor` reads.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # which reads pyproject.toml's license otherwise, in many words
    raise SystemExit(
        f"setuptools {setuptools.__version__} is too old: wanted 77 or newer; pip install --upgrade setuptools"
    )

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("FASTFLOW_BUILD", "1")  # "0", "1" or "require"
NVCC = SimpleNamespace(**runpy.run_path(str(ROOT / "fastflow" / "_nvcc.py"), run_name="fastflow._nvcc"))

# Products and sums round on their own: no contraction, no fast math. The two "no" flags change no value.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# Interleaves independent chains of the noise; g++ -O3 leaves it out on x86, and clang knows no such flag.
SCHEDULE = ("-fschedule-insns", "-fsched-pressure")
INSTRUCTION_SETS = {
    "avx2": ("-mavx2", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mf16c", "-mprefer-vector-width=512"),
}


class BuildFailed(Exception):
    """Why there is no compiled module, in words."""


class NotWanted(BuildFailed):
    """Nobody asked for the module here."""


@dataclass(frozen=True)
class Module:
    """One compiled module: (object, source, flags of its own) of each translation unit."""

    units: tuple[tuple[str, str, tuple[str, ...]], ...]
    instruction_sets: tuple[str, ...]
    libraries: tuple[str, ...] = ("-ldl",)
    nvcc: str = ""  # compiles the .cu files


def cpu_module(target: str, version: str) -> Module:
    schedule = () if "clang" in version else SCHEDULE
    sets = {"baseline": (), **(INSTRUCTION_SETS if target.startswith("x86_64") else {})}
    kernels = [
        (f"kernels_{name}", "csrc/cpu/kernels.cpp", (f"-DFASTFLOW_ISA={name}", "-Wno-psabi", *schedule, *flags))
        for name, flags in sets.items()
    ]
    plain = [(name, f"csrc/cpu/{name}.cpp", ()) for name in ("parallel", "dispatch", "policy")]
    binding = ("binding", "csrc/cpu/binding.cpp", tuple(f"-I{path}" for path in python_includes()))
    return Module((*kernels, *plain, binding), tuple(sets))


def cuda_module(target: str, version: str) -> Module:
    wanted, named = os.environ.get("FASTFLOW_CUDA", ""), os.environ.get("FASTFLOW_CUDA_ARCHS", "")
    if wanted == "0":
        raise NotWanted("it was switched off by FASTFLOW_CUDA=0")
    try:
        archs = NVCC.parse_archs(named) if named else NVCC.local_archs()
    except ValueError as error:
        raise BuildFailed(str(error)) from error
    if not archs and wanted != "1":
        raise NotWanted(
            "nvidia-smi finds no NVIDIA GPU of compute capability 8.0 or newer; FASTFLOW_CUDA=1 compiles it anyway"
        )
    nvcc = NVCC.find(os.environ.get("CUDA_HOME"))
    if nvcc is None:
        raise BuildFailed("no nvcc found (looked in CUDA_HOME, on the PATH and in /usr/local/cuda)")
    runtime = NVCC.static_runtime(nvcc)
    if runtime is None:
        raise BuildFailed(f"the CUDA toolkit {NVCC.home(nvcc)} has no libcudart_static.a")
    archs = archs or NVCC.default_archs(nvcc)
    host = (f"-ccbin={os.environ['CXX']}",) if os.environ.get("CXX") else ()
    kernels = ("kernels", NVCC.KERNELS, (*NVCC.flags(archs), *host))
    includes = (f"-I{path}" for path in python_includes())
    binding = ("binding", NVCC.BINDING, ("-DFASTFLOW_MODULE=_cuda", *includes))
    libraries = (str(runtime), "-lpthread", "-lrt", "-ldl")
    return Module((kernels, binding), tuple(f"sm_{arch}" for arch in archs), libraries, nvcc)


MODULES = {"cpu": cpu_module, "cuda": cuda_module}


def python_includes() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise BuildFailed("pybind11 is not installed in the build environment") from error
    return [pybind11.get_include(), sysconfig.get_path("include")]


def find_ninja() -> str:
    try:
        import ninja

        bundled = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        bundled = None
    found = bundled or shutil.which("ninja")
    if found is None:
        raise BuildFailed("ninja is not installed in the build environment")
    return found


def find_compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise BuildFailed(f"no C++ compiler found (looked for {', '.join(names)}; CXX names another)")


def ask(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildFailed(f"`{' '.join(command)}` failed: {error}") from error


def escape(text: str | Path) -> str:
    """A path or an argument in a ninja file."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(compiler: str, module: Module, output: Path) -> str:
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {escape(compiler)}",
        f"flags = {' '.join(FLAGS)}",
        "rule compile",
        "  command = $cxx $flags $own -c $in -o $out",
        "rule cuda",
        f"  command = {escape(module.nvcc)} $own -c $in -o $out",
        "rule link",
        f"  command = $cxx -shared -s $in -o $out {' '.join(map(escape, module.libraries))}",
    ]
    for name, source, own in module.units:
        rule = "cuda" if source.endswith(".cu") else "compile"
        lines += [f"build {name}.o: {rule} {escape(ROOT / source)}", f"  own = {' '.join(map(escape, own))}"]
    objects = " ".join(f"{name}.o" for name, _, _ in module.units)
    return "\n".join([*lines, f"build {escape(output.resolve())}: link {objects}", ""])


def compile_module(name: str, output: Path, record: dict[str, object]) -> None:
    """Builds `output` in a fresh folder; fills in the record. Raises BuildFailed."""
    if MODE == "0":
        raise BuildFailed("compilation was switched off by FASTFLOW_BUILD=0")
    if not sys.platform.startswith("linux"):
        raise BuildFailed(f"it is compiled on Linux only, and this is {sys.platform}")
    compiler = find_compiler()
    version = record["compiler"] = ask(compiler, "--version").partition("\n")[0]
    module = MODULES[name](ask(compiler, "-dumpmachine"), version)
    record["flags"], record["instruction_sets"] = FLAGS, list(module.instruction_sets)
    if module.nvcc:
        record["compiler"] = f"nvcc {NVCC.version(module.nvcc)}, {version}"
        record["flags"] = [*NVCC.FLAGS]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "build.ninja").write_text(ninja_file(compiler, module, output))
        done = subprocess.run([find_ninja(), "-C", folder], capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()
        sys.stderr.write("\n".join([*lines[-40:], ""]))
        cause = next((line for line in lines if "error" in line), lines[-1] if lines else "no output")
        raise BuildFailed(f"the compiler failed: {cause.strip()}")


class NinjaBuild(build_ext):
    """build_ext that leaves the compiling to ninja and survives without a compiler."""

    def run(self) -> None:
        self.records: dict[str, dict[str, object]] = {}
        super().run()
        self.write_record(Path(self.build_lib) / "fastflow")
        if self.inplace:
            self.write_record(ROOT / "fastflow")
            for extension in self.extensions:
                if not self.records[self.short_name(extension)]["ok"]:
                    (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)

    def build_extension(self, extension: Extension) -> None:
        name, output = self.short_name(extension), Path(self.get_ext_fullpath(extension.name))
        record: dict[str, object] = {"ok": False, "reason": None}
        self.records[name] = record
        output.unlink(missing_ok=True)
        try:
            compile_module(name, output, record)
        except BuildFailed as error:
            record["reason"] = str(error)
            if isinstance(error, NotWanted):
                return
            if MODE == "require":
                raise SystemExit(f"fastflow._{name} was not built, and FASTFLOW_BUILD=require: {error}") from error
            sys.stderr.write(f"fastflow._{name} was not built: {error}. fastflow will run without it, more slowly.\n")
        else:
            record["ok"] = True

    def write_record(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(self.records, indent=2) + "\n")

    @staticmethod
    def short_name(extension: Extension) -> str:
        return str(extension.name).rpartition("._")[2]


setup(
    ext_modules=[Extension(f"fastflow._{name}", sources=[], optional=True) for name in MODULES],
    cmdclass={"build_ext": NinjaBuild},
)
