"""What this machine has and what fastflow can use of it: what `fastflow doctor` prints, as data."""

from __future__ import annotations

import importlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from . import _env

PACKAGES = ("torch", "numpy", "safetensors", "triton", "diffusers", "transformers", "xformers")
BUILD_RECORD = Path(__file__).with_name("_build.json")


def collect() -> dict[str, Any]:
    """A report that JSON can hold.

    Keys: fastflow (version, folder), python, platform, packages (name -> version or None), build (what the installation
    recorded of the compiled modules; None if it recorded nothing), backends (list of name, reason: None if it runs
    here), cpu (model, cores, instructions chosen by the compiled module or None, torch_threads), gpus (list of name,
    capability, memory_gib), cuda (the version torch was built for, or None) and cache (FASTFLOW_CACHE_DIR: folder, archs of
    Triton kernels, cuda: archs and PTX of the CUDA module, problems in words; None if it is not set).
    """
    import torch

    from . import __version__, backends

    return {
        "fastflow": {"version": __version__, "folder": str(Path(__file__).parent)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "build": build_record(),
        "backends": [{"name": name, "reason": reason} for name, reason in backends.report()],
        "cpu": {
            "model": cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "instructions": instructions(),
            "torch_threads": torch.get_num_threads(),
        },
        "gpus": gpus(),
        "cuda": torch.version.cuda,
        "cache": cache(),
    }


def version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def build_record(path: Path = BUILD_RECORD) -> dict[str, Any] | None:
    """What the installation wrote about compiling the modules; None for a checkout that was never built."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return {"error": f"{path.name} cannot be read: {error}"}
    return record if isinstance(record, dict) else {"error": f"{path.name} holds no record"}


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instructions() -> str | None:
    """The instruction set that the compiled CPU module runs with here; None without that module."""
    from .backends import unavailable

    return None if unavailable("cpu") is not None else str(importlib.import_module("fastflow._cpu").isa())


def cache() -> dict[str, Any] | None:
    """What FASTFLOW_CACHE_DIR names, and what keeps it from serving this installation."""
    folder = _env.cache_dir()
    if folder is None:
        return None
    from .compile import cache as kernels
    from .compile import module
    from .errors import BackendError

    found = kernels.archs(folder)
    cuda: list[str] = []
    problems: list[str] = []
    if not folder.is_dir():
        kind = "is a file, wanted a folder" if folder.exists() else "does not exist"
        problems.append(
            f"FASTFLOW_CACHE_DIR: {folder} {kind}; run `fastflow compile --out DIR` and name DIR, or unset it"
        )
        return {"folder": str(folder), "archs": found, "cuda": cuda, "problems": problems}
    here = [f"sm_{gpu['capability'].replace('.', '')}" for gpu in gpus()]
    for arch in found:
        try:
            kernels.check(folder, arch)
        except (BackendError, ImportError) as error:
            problems.append(str(error))
    try:
        if module.find(folder) is not None:
            manifest = module.read(folder) or {}
            cuda = [*manifest["archs"], *(f"PTX of {name}" for name in manifest["ptx"])]
    except BackendError as error:
        problems.append(str(error))
    if not found and not cuda and not problems:
        problems.append(f"no compiled kernels in {folder}; run `fastflow compile --out {folder}`")
    elif found:
        problems += [
            f"no Triton kernels for this machine's {arch}" for arch in dict.fromkeys(here) if arch not in found
        ]
    return {"folder": str(folder), "archs": found, "cuda": cuda, "problems": problems}


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def why_no_gpu() -> str:
    """In words, for a machine on which `gpus()` is empty."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"none: torch {torch.__version__} is built for the CPU only"
    return f"none: torch {torch.__version__} sees no device (driver, or CUDA_VISIBLE_DEVICES)"
