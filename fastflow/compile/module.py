"""The CUDA module in a folder that `fastflow compile` wrote: cuda/manifest.json and cuda/_cuda.*.so."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from .cache import FORMAT, MANIFEST, faults, refuse_file
from .errors import CacheError

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
PARTS = {
    "fastflow": str, "sources": (str, type(None)), "suffix": str, "module": str, "size": int, "sha256": str, "archs": list,
    "ptx": list,
}  # fmt: skip
_REMEDY = "run `fastflow compile --backend cuda --out DIR` with this installation, or unset it"


def fingerprint() -> dict[str, Any]:
    """What a module must share with the installation that loads it; sources where they are at hand."""
    from .. import __version__

    found: dict[str, Any] = {"format": FORMAT, "fastflow": __version__, "suffix": SUFFIX, "sources": None}
    folder = ROOT / "csrc"
    if folder.is_dir():
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "cpu" not in path.parts]
        found["sources"] = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    return found


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest; None for a folder without a CUDA module. Raises CacheError where it cannot be read."""
    refuse_file(folder)
    path = folder / "cuda" / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CacheError(f"FASTFLOW_CACHE_DIR: {path} cannot be read: {error}; {_REMEDY}") from error
    if not isinstance(manifest, dict):
        raise CacheError(f"FASTFLOW_CACHE_DIR: {path} is no manifest; {_REMEDY}")
    return manifest


def stamp(path: Path) -> dict[str, Any]:
    """What a manifest says of the module's file: its name, its size and its SHA-256 sum."""
    data = path.read_bytes()
    return {"module": path.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def find(folder: Path) -> Path | None:
    """The module's file, if it fits this installation and is what was written; None for a folder without one.

    Raises CacheError. A truncated file must not reach the loader, which the system would end with the whole process.
    """
    manifest = read(folder)
    if manifest is None:
        return None
    place, now = folder / "cuda", fingerprint()
    if manifest.get("format") != FORMAT:
        raise _stale(place, f"its format is {manifest.get('format')}, this fastflow reads {FORMAT}")
    if "sha256" not in manifest or "size" not in manifest:
        raise _stale(place, f"its {MANIFEST} is older, without the size and the sum of the module's file")
    wrong = faults(manifest, PARTS)
    if wrong:
        raise CacheError(f"FASTFLOW_CACHE_DIR: {place / MANIFEST} is no manifest: {'; '.join(wrong)}; {_REMEDY}")
    found = []
    if manifest["fastflow"] != now["fastflow"]:
        found.append(f"fastflow was {manifest['fastflow']}, here it is {now['fastflow']}")
    elif None not in (manifest["sources"], now["sources"]) and manifest["sources"] != now["sources"]:
        found.append("the sources in csrc/ have changed")
    if manifest["suffix"] != SUFFIX:
        found.append(f"it was compiled for the Python of {manifest['suffix']}, this one loads {SUFFIX}")
    path = place / str(manifest["module"])
    if not found and not path.is_file():
        found.append(f"{path.name} is not there")
    if found:
        raise _stale(place, "; ".join(found))
    _compare(path, manifest)
    return path


def _stale(place: Path, found: str) -> CacheError:
    return CacheError(f"FASTFLOW_CACHE_DIR: {place} is stale: {found}; {_REMEDY}")


def _compare(path: Path, manifest: dict[str, Any]) -> None:
    """Raises CacheError for a file that is not what was written."""
    try:
        there = stamp(path)
    except OSError as error:
        raise CacheError(f"FASTFLOW_CACHE_DIR: {path} cannot be read: {error}; {_REMEDY}") from error
    if there["size"] != manifest["size"]:
        wrong = f"it has {there['size']} bytes, and {manifest['size']} were written"
    elif there["sha256"] != manifest["sha256"]:
        wrong = "its SHA-256 sum is not the one that was written"
    else:
        return
    raise CacheError(f"FASTFLOW_CACHE_DIR: {path} is broken: {wrong}; copy the folder again, or {_REMEDY}")


def load(folder: Path) -> ModuleType | None:
    """fastflow._cuda from a folder; None for a folder without one. Raises CacheError, or ImportError from the loader."""
    path = find(folder)
    if path is None:
        return None
    loader = importlib.machinery.ExtensionFileLoader("fastflow._cuda", str(path))
    spec = importlib.util.spec_from_loader("fastflow._cuda", loader)
    if spec is None:
        raise CacheError(f"FASTFLOW_CACHE_DIR: {path} cannot be loaded; {_REMEDY}")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
