"""Compiles the Triton kernels for an architecture by running the backend's own launches under a stand-in for the driver.

A launch that compiles stores its kernel under the launcher's key; a source built by hand lands under another one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

from .. import _env
from . import cache
from .errors import CompileError
from .resources import measure, tool
from .targets import Target, find
from .variants import Compiled, variants

MIN_TRITON = (3, 6)  # since then a launch can be taken from a folder by its specialization


class StandIn:
    """A driver that names a target and launches nothing."""

    def __init__(self, number: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.utils = GPUTarget("cuda", number, 32), self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return -int(self.target.arch)  # Triton keeps kernels per device; no real one is negative

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, *arguments: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


def why_not() -> str | None:
    """Why Triton kernels cannot be compiled here, in words; None if they can."""
    if _env.triton_interpret():
        return "TRITON_INTERPRET is set, so Triton compiles nothing in this process; unset it"
    try:
        import triton
    except ImportError as error:
        return f'triton cannot be imported ({error}); pip install "fastflow[triton]"'
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"triton {triton.__version__} is too old: wanted {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer"
    return None


def build(
    targets: list[Target],
    folder: Path,
    only: str = "",
    jobs: int | None = None,
    sass: bool = True,
    calls: Sequence[Compiled] | None = None,
) -> list[dict[str, Any]]:
    """Compiles for every target, a process each; the entries of their manifests. `only`: part of a variant's label.
    sass: look at machine code. calls: what to compile, in place of the common variants.

    Raises CompileError.
    """
    calls = list(variants() if calls is None else calls)
    reason = why_not()
    if reason is not None:
        raise CompileError(reason)
    if not any(only in call.label for call in calls):
        raise CompileError(f"--only: no variant's name has {only!r} in it; `--only ''` takes all")
    for name in ("ptxas", "ptxas_blackwell", "cuobjdump", "nvdisasm"):
        tool(name)
    numbers = list(dict.fromkeys(target.number for target in targets))
    workers = min(len(numbers), jobs or len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        chosen = [call for call in calls if only in call.label]
        made = pool.map(_compile, numbers, repeat(folder), repeat(only), repeat(sass), repeat(chosen))
        return [entry for entries in made for entry in entries]


def _compile(number: int, folder: Path, only: str, sass: bool, calls: Sequence[Compiled]) -> list[dict[str, Any]]:
    """One architecture, in a process of its own: Triton's driver, cache and hooks are the process's."""
    import torch
    import triton
    from triton import knobs
    from triton.runtime import driver

    from ..kernels import config

    torch.set_num_threads(1)
    arch = f"sm_{number}"
    place = cache.place(folder, arch)
    stand_in = StandIn(number)
    driver.set_active(stand_in)
    knobs.cache.manager_class = cache.manager(place, writing=True)
    knobs.compilation.store_binary_only = True
    compiled: list[dict[str, Any]] = []
    label = ""

    def record(*, key: str, fn: Any, compile: dict[str, Any], **rest: Any) -> None:
        kernel = fn.jit_function.device_caches[stand_in.get_current_device()][0][key]
        name, path = fn.name.rpartition(".")[2], Path(kernel.metadata_group[f"{kernel.name}.cubin"])
        found = measure(path, sass)[kernel.name]
        shared, warps = kernel.metadata.shared, kernel.metadata.num_warps  # Triton's is all given at launch
        compiled.append(
            {
                "backend": "triton",
                "arch": arch,
                "kernel": name,
                "module": fn.module.rpartition(".")[2],
                "variant": label,
                "folder": path.parent.name,
                "warps": warps,
                "block": chosen.block,
                **asdict(found),
                "shared": shared,
                "spills": found.spills,
                "occupancy": find(arch).occupancy(found.registers, warps, shared),
                "specialization": compile["specialization_data"],
            }
        )

    knobs.runtime.jit_post_compile_hook = record
    (place / cache.MANIFEST).unlink(missing_ok=True)  # what is half written is no cache
    try:
        for chosen in config.for_arch(arch):
            for call in calls:
                label = call.label
                call.launch(chosen)
    except (triton.CompilationError, RuntimeError) as error:
        raise CompileError(f"{arch}, {label}: {error}") from error
    for path in place.glob("*/*.source"):
        path.unlink()
    for entry in compiled:
        entry["files"] = cache.sums(place / entry["folder"])
    manifest = cache.fingerprint(number) | {"only": only, "variants": compiled}
    (place / cache.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return compiled
