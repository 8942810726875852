"""What `fastflow compile` writes is what a process that starts afterwards finds, or refuses in words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastflow import doctor
from fastflow.compile import cache
from fastflow.compile.errors import CacheError
from tests.compile.conftest import ONLY
from tests.packaging.repository import ROOT


def second(folder: Path, tmp_path: Path, number: int = 90, **environment: str) -> dict[str, Any]:
    """A process with FASTFLOW_CACHE_DIR and an empty Triton cache of its own."""
    own = tmp_path / "triton"
    variables = os.environ | {"FASTFLOW_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(own), **environment}
    variables |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.compile.second", str(number), ONLY]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not own.exists() or not list(own.iterdir()), "Triton's own cache was written"
    return report


def test_a_second_process_finds_all_and_compiles_none(folder: Path, entries: list[Any], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)  # a folder is copied to the nodes that use it
    report = second(moved, tmp_path)
    assert report == {"compiled": [], "found": len(entries), "missed": [], "error": None}
    assert {entry["kernel"] for entry in entries} == {"step_kernel", "finish_kernel"}


def test_a_setting_that_changes_the_code_is_named(folder: Path, tmp_path: Path) -> None:
    report = second(folder, tmp_path, DISABLE_PTXAS_OPT="1")
    assert "DISABLE_PTXAS_OPT was None, here it is 'true'" in report["error"]
    assert report["compiled"] == []


def test_another_arch_is_named(folder: Path, tmp_path: Path) -> None:
    error = second(folder, tmp_path, number=89)["error"]
    assert "wanted kernels for sm_89" in error and "it holds sm_90" in error
    assert "fastflow compile --arch sm_89" in error


def test_a_changed_kernel_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastflow import kernels

    cache.check(folder, "sm_90")
    copied = tmp_path / "kernels"
    shutil.copytree(kernels.__path__[0], copied)
    source = copied / "transition.py"
    source.write_text(source.read_text() + "\n\n@triton.jit\ndef more(x):\n    return x\n")
    monkeypatch.setattr(kernels, "__path__", [str(copied)])
    with pytest.raises(CacheError, match=r"is stale: the source of kernels has changed: transition\.py; run"):
        cache.check(folder, "sm_90")


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("triton", "3.1.4", "Triton was 3.1.4, here it is "),
        ("triton files", "0", "itself have changed"),
        ("ptxas", "Cuda compilation tools, release 11.1, V11.1.0", "ptxas was 11.1, V11.1.0, here it is "),
        ("arch", "sm_80", "it is for sm_80, this is sm_90"),
        ("format", 0, "its format is 0, this fastflow reads 1"),
        ("settings", {"TRITON_DEBUG": True}, "TRITON_DEBUG was True, here it is False"),
    ],
)
def test_what_differs_is_named(folder: Path, part: str, value: Any, words: str) -> None:
    manifest, now = cache.read(folder, "sm_90"), cache.fingerprint(90)
    assert cache.differences(manifest, now) == []
    found = cache.differences(manifest | {part: value}, now)
    assert any(words in line for line in found), found


def test_a_kernel_that_is_gone_is_not_compiled_behind_the_back(
    folder: Path, entries: list[Any], tmp_path: Path
) -> None:
    partly = tmp_path / "partly"
    shutil.copytree(folder, partly)
    shutil.rmtree(cache.place(partly, "sm_90") / entries[0]["folder"])
    assert "is not there, although its manifest fits" in second(partly, tmp_path)["error"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: {"format": 1}, r"it lacks 'arch', 'triton', .*'variants'"),
        (lambda manifest: manifest | {"kernels": []}, r"'kernels' is a list"),
        (lambda manifest: manifest | {"variants": [{"module": "transition"}]}, r"it lacks 'kernel', 'folder'"),
        (lambda manifest: manifest | {"variants": [3]}, r"a variant is no object"),
    ],
)
def test_a_manifest_that_lacks_parts_is_named(folder: Path, tmp_path: Path, change: Any, words: str) -> None:
    path = cache.place(tmp_path, "sm_90") / cache.MANIFEST
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(change(cache.read(folder, "sm_90"))))
    for read in (cache.check, cache.load):
        with pytest.raises(
            CacheError, match=rf"manifest\.json is no manifest: {words}.*; run `fastflow compile --arch sm_90"
        ):
            read(tmp_path, "sm_90")


def test_an_older_manifest_is_stale(folder: Path, tmp_path: Path) -> None:
    manifest = cache.read(folder, "sm_90")
    for entry in manifest["variants"]:
        del entry["files"]
    path = cache.place(tmp_path, "sm_90") / cache.MANIFEST
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"is stale: its manifest\.json is older, without the sums of its files; run"):
        cache.check(tmp_path, "sm_90")


def gone(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("harm", "words"), [(gone, "is not there, although its manifest fits"), (truncated, "is broken: its SHA-256 sum")]
)
@pytest.mark.parametrize("kind", ["cubin", "json"])
def test_a_file_that_is_gone_or_broken_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, harm: Any, words: str
) -> None:
    partly = tmp_path / "partly"
    shutil.copytree(folder, partly)
    path = next(cache.place(partly, "sm_90").glob(f"*/*.{kind}"))
    harm(path)
    for read in (cache.check, cache.load):
        with pytest.raises(
            CacheError, match=rf"{path.name} {words}.*; copy the folder again, or run `fastflow compile"
        ):
            read(partly, "sm_90")
    monkeypatch.setenv("FASTFLOW_CACHE_DIR", str(partly))
    (problem,) = (doctor.cache() or {})["problems"]
    assert words in problem


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_manifest_that_cannot_be_read_is_named(folder: Path, tmp_path: Path, text: str) -> None:
    place = cache.place(tmp_path, "sm_90")
    place.mkdir(parents=True)
    (place / cache.MANIFEST).write_text(text)
    with pytest.raises(CacheError, match=r"manifest\.json (cannot be read|is no manifest)"):
        cache.check(tmp_path, "sm_90")


def test_an_empty_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="it holds no compiled kernels"):
        cache.check(tmp_path, "sm_90")
    with pytest.raises(CacheError, match="it does not exist"):
        cache.check(tmp_path / "none", "sm_90")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for read in (cache.check, cache.load):
        with pytest.raises(
            CacheError, match=r"FASTFLOW_CACHE_DIR: wanted a folder that .* got the file .*file; name a"
        ):
            read(tmp_path / "file", "sm_90")


def test_other_folders_are_no_architectures(tmp_path: Path) -> None:
    for name in ("sm_90", "sm_x", "old"):
        (tmp_path / "triton" / name).mkdir(parents=True)
        (tmp_path / "triton" / name / cache.MANIFEST).write_text("{}")
    assert cache.archs(tmp_path) == ["sm_90"]
