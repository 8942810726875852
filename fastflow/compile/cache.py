"""The folder that `fastflow compile` writes and FASTFLOW_CACHE_DIR names: a manifest and compiled kernels an architecture.

    DIR/triton/sm_90/manifest.json       what it was compiled with, and every kernel's specialization
    DIR/triton/sm_90/<key>/<kernel>.json, .cubin      under Triton's own cache key

A manifest is compared with this installation, part by part, before anything is loaded: Triton's key holds all of them in
one hash, and a key that is not found is compiled anew without a word. Kernels are then loaded into Triton's table of this
process, all at once; neither TRITON_CACHE_DIR nor another of Triton's settings is changed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from .errors import CacheError

FORMAT = 1
MANIFEST = "manifest.json"
PARTS = {
    "arch": str, "triton": str, "triton files": str, "ptxas": str, "kernels": dict, "environment": dict, "settings": dict,
    "variants": list,
}  # fmt: skip
ENTRY = {"module": str, "kernel": str, "folder": str, "specialization": str}  # what loading reads of a variant


class Folder:
    """Triton's cache manager (`triton.runtime.cache.CacheManager`) over one architecture's folder; paths are found anew,
    so that the folder can be moved. `writing` compiles everything; otherwise a kernel that is not there is an error."""

    def __init__(self, root: Path, writing: bool, key: str, override: bool = False, dump: bool = False) -> None:
        self.path, self.writing = root / key, writing

    def get_file(self, filename: str) -> str | None:
        path = self.path / filename
        return str(path) if path.is_file() else None

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        self.path.mkdir(parents=True, exist_ok=True)
        part = self.path / f"{filename}.{uuid.uuid4().hex}"
        part.write_bytes(data if isinstance(data, bytes) else str(data).encode("utf-8"))
        os.replace(part, self.path / filename)
        return str(self.path / filename)

    def get_group(self, filename: str) -> dict[str, str] | None:
        if self.writing:
            return None
        files = {path.name: str(path) for path in self.path.iterdir()} if self.path.is_dir() else {}
        if filename not in files:
            raise CacheError(
                f"FASTFLOW_CACHE_DIR: {self.path} is not there, although its manifest fits; compile into an empty folder"
            )
        return files

    def put_group(self, filename: str, group: dict[str, str]) -> None:
        """Nothing: the folder is the group."""


def manager(root: Path, *, writing: bool) -> Any:
    """What Triton calls with a key."""
    return partial(Folder, root, writing)


def place(folder: Path, arch: str) -> Path:
    """Where an architecture's Triton kernels lie."""
    return folder / "triton" / arch


def fingerprint(number: int) -> dict[str, Any]:
    """Everything that Triton's keys depend on beside the launch itself, for an architecture by its number."""
    import triton
    from triton import knobs
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key

    from .. import kernels

    (root,) = kernels.__path__
    return {
        "format": FORMAT,
        "arch": f"sm_{number}",
        "triton": triton.__version__,
        "triton files": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": make_backend(GPUTarget("cuda", number, 32)).hash().rpartition("-")[0],
        "kernels": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(root).glob("*.py"))
        },
        "environment": dict(sorted(get_cache_invalidating_env_vars().items())),
        "settings": {
            "TRITON_DEBUG": bool(knobs.runtime.debug),
            "TRITON_OVERRIDE_ARCH": knobs.runtime.override_arch,
            "TRITON_INSTRUMENTATION_MODE": knobs.compilation.instrumentation_mode,
            "PTXAS_OPTIONS": knobs.nvidia.ptxas_options,
        },
    }


def differences(manifest: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what a manifest was written with and this installation has otherwise."""
    found = []
    if manifest.get("format") != now["format"]:
        return [f"its format is {manifest.get('format')}, this fastflow reads {now['format']}"]
    if manifest["arch"] != now["arch"]:
        found.append(f"it is for {manifest['arch']}, this is {now['arch']}")
    if manifest["triton"] != now["triton"]:
        found.append(f"Triton was {manifest['triton']}, here it is {now['triton']}")
    elif manifest["triton files"] != now["triton files"]:
        found.append(f"files of Triton {now['triton']} itself have changed")
    if manifest["ptxas"] != now["ptxas"]:
        found.append(f"ptxas was {_release(manifest['ptxas'])}, here it is {_release(now['ptxas'])}")
    before, after = manifest["kernels"], now["kernels"]
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if changed:
        found.append(f"the source of kernels has changed: {', '.join(changed)}")
    for part in ("environment", "settings"):
        was, there = manifest[part], now[part]
        for name in sorted(was.keys() | there.keys()):
            if was.get(name) != there.get(name):
                found.append(f"{name} was {was.get(name)!r}, here it is {there.get(name)!r}")
    return found


def faults(manifest: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    """In words, which parts of a manifest are missing or are not of their kind; `parts`: name -> type or types."""
    lacks = [name for name in parts if name not in manifest]
    other = [name for name, kind in parts.items() if name in manifest and not isinstance(manifest[name], kind)]
    found = [f"it lacks {', '.join(map(repr, lacks))}"] if lacks else []
    return found + [f"{name!r} is a {type(manifest[name]).__name__}" for name in other]


def _release(version: str) -> str:
    """The line of `ptxas --version` that names the release."""
    lines = [line for line in version.splitlines() if "release" in line]
    return (lines[0] if lines else version).split("release ")[-1].strip()


def archs(folder: Path) -> list[str]:
    """The architectures that a folder has Triton kernels for."""
    names = [path.parent.name for path in (folder / "triton").glob(f"sm_*/{MANIFEST}")]
    return sorted(name for name in names if name.removeprefix("sm_").isdecimal())


def refuse_file(folder: Path) -> None:
    """Raises CacheError where FASTFLOW_CACHE_DIR names a file."""
    if folder.exists() and not folder.is_dir():
        raise CacheError(
            f"FASTFLOW_CACHE_DIR: wanted a folder that `fastflow compile --out DIR` wrote, got the file {folder}; name a "
            "folder, or unset it"
        )


def read(folder: Path, arch: str) -> dict[str, Any]:
    """An architecture's manifest. Raises CacheError where there is none, or it is none."""
    refuse_file(folder)
    path = place(folder, arch) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = ", ".join(archs(folder))
        held = (
            f"it holds {there}" if there else "it holds no compiled kernels" if folder.is_dir() else "it does not exist"
        )
        raise CacheError(
            f"FASTFLOW_CACHE_DIR: wanted kernels for {arch} in {folder}, but {held}; {remedy(arch)}"
        ) from error
    except (OSError, ValueError) as error:
        raise CacheError(f"FASTFLOW_CACHE_DIR: {path} cannot be read: {error}; {remedy(arch)}") from error
    if not isinstance(manifest, dict):
        raise CacheError(f"FASTFLOW_CACHE_DIR: {path} is no manifest; {remedy(arch)}")
    return manifest


def check(folder: Path, arch: str) -> dict[str, Any]:
    """The manifest, if it fits this installation and its files are what was written.

    Raises CacheError that says what differs and what to run.
    """
    manifest, here = read(folder, arch), place(folder, arch)
    wrong = []
    if manifest.get("format") == FORMAT:
        wrong = faults(manifest, PARTS)
        for entry in [] if wrong else manifest["variants"]:
            wrong = wrong or (_entry_faults(entry) if isinstance(entry, dict) else ["a variant is no object"])
    if wrong:
        raise CacheError(f"FASTFLOW_CACHE_DIR: {here / MANIFEST} is no manifest: {'; '.join(wrong)}; {remedy(arch)}")
    found = differences(manifest, fingerprint(int(arch.removeprefix("sm_"))))
    if found:
        raise CacheError(f"FASTFLOW_CACHE_DIR: {here} is stale: {'; '.join(found)}; {remedy(arch)}")
    if not all("files" in entry for entry in manifest["variants"]):
        older = f"its {MANIFEST} is older, without the sums of its files"
        raise CacheError(f"FASTFLOW_CACHE_DIR: {here} is stale: {older}; {remedy(arch)}")
    for entry in manifest["variants"]:
        _check_files(here / entry["folder"], entry["files"], arch)
    return manifest


def _entry_faults(entry: dict[str, Any]) -> list[str]:
    return faults(entry, ENTRY | ({"files": dict} if "files" in entry else {}))


def sums(group: Path) -> dict[str, str]:
    """Name -> SHA-256 sum of a kernel's files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(group.iterdir())}


def _check_files(group: Path, files: dict[str, str], arch: str) -> None:
    """Raises CacheError for a kernel's file that is gone or is not what was written."""
    try:
        there = sums(group) if group.is_dir() else {}
    except OSError as error:
        raise CacheError(f"FASTFLOW_CACHE_DIR: {group} cannot be read: {error}; {remedy(arch)}") from error
    again = f"copy the folder again, or {remedy(arch)}"
    for name, written in files.items():
        if name not in there:
            raise CacheError(f"FASTFLOW_CACHE_DIR: {group / name} is not there, although its manifest fits; {again}")
        if there[name] != written:
            raise CacheError(
                f"FASTFLOW_CACHE_DIR: {group / name} is broken: its SHA-256 sum is not the one that was written; {again}"
            )


def remedy(arch: str) -> str:
    return f"run `fastflow compile --arch {arch} --backend triton --out DIR` with this installation, or unset it"


def load(folder: Path, arch: str) -> int:
    """Loads an architecture's kernels into Triton's table for the current device; how many. Raises CacheError."""
    from triton import knobs

    manifest = check(folder, arch)
    with knobs.cache.scope():
        knobs.cache.manager_class = manager(place(folder, arch), writing=False)
        for entry in manifest["variants"]:
            module = importlib.import_module(f"fastflow.kernels.{entry['module']}")
            getattr(module, entry["kernel"]).preload(entry["specialization"])
    return len(manifest["variants"])
