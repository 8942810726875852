"""The CUDA programs on this machine's CPU: the same sources, compiled with g++ into loops over blocks and threads."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from fastflow.backends import cuda
from tests.cuda.backends import OnGpu

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing")
GPU = [pytest.param("gpu", marks=pytest.mark.gpu)] if cuda.unavailable() is None else []


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module that fastflow._cuda would be, running on the CPU."""
    compiler = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all processes of a run share
    target = folder / "_emulated.so"
    includes = (f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))
    sources = (ROOT / "tests" / "cuda" / "emulator.cpp", ROOT / "csrc" / "cuda" / "binding.cpp")
    command = (compiler, *FLAGS, "-DFASTFLOW_MODULE=_emulated", *includes, *map(str, sources))
    with (folder / "emulator.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            subprocess.run((*command, "-o", f"{target}.part"), check=True)
            Path(f"{target}.part").rename(target)
    specification = importlib.util.spec_from_file_location("_emulated", target)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Backend cuda on CPU tensors; `order` says how blocks and threads are run: emulator.cpp."""

    class Emulated:
        order = 0

    monkeypatch.setattr(cuda, "_module", lambda: emulator)
    monkeypatch.setattr(cuda, "_stream", lambda device: (0, Emulated.order))
    for name in ("step", "log_prob_backward", "policy_rows", "matching", "matching_backward"):
        setattr(Emulated, name, staticmethod(getattr(cuda, name)))
    return Emulated


@pytest.fixture(params=["forward", "backward", *GPU])
def device(request: pytest.FixtureRequest) -> Any:
    """Backend cuda for CPU tensors: emulated with threads and blocks in one order and in the other, and on a GPU."""
    if request.param == "gpu":
        return OnGpu
    backend = request.getfixturevalue("emulated")
    backend.order = 0 if request.param == "forward" else 3
    return backend
