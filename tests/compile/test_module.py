"""The CUDA module: what its builder is asked for, how its kernels are named, and when a folder's module is refused."""

from __future__ import annotations

import importlib.machinery
import json
from pathlib import Path
from typing import Any

import pytest

from fastflow import _nvcc, doctor
from fastflow.compile import module, nvcc_aot, targets
from fastflow.compile.errors import CacheError, CompileError


def test_what_the_builder_is_asked_for() -> None:
    assert nvcc_aot.archs_of(targets.find_all(list(targets.DEFAULT))) == ["80+PTX", "89", "90", "100", "120+PTX"]
    assert nvcc_aot.archs_of(targets.find_all(["sm_90a"])) == ["90a", "80-virtual", "120-virtual"]
    for names in (["80+PTX", "89"], ["90a", "120-virtual"]):
        assert _nvcc.parse_archs(";".join(names)) == names


def test_code_is_for_the_targets_alone_and_ptx_is_said() -> None:
    asked = targets.find_all(["sm_90"])
    assert _nvcc.held(nvcc_aot.archs_of(asked)) == (["sm_90"], ["compute_80", "compute_120"])
    assert nvcc_aot.contents(asked) == "code for sm_90, and PTX of compute_80 and compute_120 for other GPUs"


def test_names_of_kernels() -> None:
    mangled = [
        "_ZN8fastflow43_GLOBAL__N__618bbb7b_10_kernels_cu_0cf0c9336kernelINS_4StepILi3ELi1ELb0ELb1EEEEEvNS_4CallE",
        "_ZN8fastflow43_GLOBAL__N__618bbb7b_10_kernels_cu_0cf0c9336kernelINS_8GradientEEEvNS_4CallE",
        "something_else",
    ]
    if nvcc_aot.shutil.which("c++filt") is None:
        pytest.skip("needs c++filt, which compilers bring")
    assert nvcc_aot.names(mangled) == [("Step", "3, 1, false, true"), ("Gradient", ""), ("something_else", "")]


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A folder as `build` leaves it, around a file that is no module."""
    name = f"_cuda{module.SUFFIX}"
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / name).write_bytes(b"no module")
    manifest = module.fingerprint() | module.stamp(tmp_path / "cuda" / name)
    manifest |= {"nvcc": "13.0", "archs": ["sm_80"], "ptx": ["compute_80"]}
    (tmp_path / "cuda" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def change(folder: Path, **changes: Any) -> None:
    path = folder / "cuda" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_module_that_fits_is_found_and_loaded(compiled: Path) -> None:
    found = module.find(compiled)
    assert found == compiled / "cuda" / f"_cuda{module.SUFFIX}"
    with pytest.raises(ImportError):  # the loader's own words on a file that is no module
        module.load(compiled)
    assert any(found.name.endswith(suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert module.find(tmp_path) is None and module.load(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 0}, "its format is 0"),
        ({"fastflow": "0.0.1"}, "fastflow was 0.0.1, here it is"),
        ({"sources": "0"}, "the sources in csrc/ have changed"),
        ({"suffix": ".cpython-39.so"}, r"compiled for the Python of \.cpython-39\.so"),
        ({"module": "_gone.so"}, r"_gone\.so is not there"),
    ],
)
def test_a_module_that_does_not_fit(compiled: Path, changes: dict[str, Any], words: str) -> None:
    change(compiled, **changes)
    with pytest.raises(CacheError, match=f"cuda is stale: .*{words}.*; run `fastflow compile --backend cuda"):
        module.find(compiled)


def without(folder: Path, *names: str) -> None:
    path = folder / "cuda" / "manifest.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name not in names}
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize("name", ["sources", "fastflow", "suffix", "module", "archs", "ptx"])
def test_a_manifest_that_lacks_a_part(compiled: Path, name: str) -> None:
    without(compiled, name)
    with pytest.raises(CacheError, match=rf"manifest\.json is no manifest: it lacks '{name}'; run `fastflow compile"):
        module.find(compiled)


def test_a_manifest_with_a_part_of_another_kind(compiled: Path) -> None:
    change(compiled, archs="sm_80", size="9")
    with pytest.raises(CacheError, match="no manifest: 'size' is a str; 'archs' is a str; run"):
        module.find(compiled)


def test_an_older_manifest_is_stale(compiled: Path) -> None:
    without(compiled, "size", "sha256", "ptx")
    with pytest.raises(CacheError, match=r"is stale: its manifest\.json is older, without the size and the sum"):
        module.find(compiled)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"no mod", "it has 6 bytes, and 9 were written"), (b"no modulE", "its SHA-256 sum is not the one")],
)
def test_a_broken_module_never_reaches_the_loader(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, words: str
) -> None:
    (compiled / "cuda" / f"_cuda{module.SUFFIX}").write_bytes(data)
    for read in (module.find, module.load):
        with pytest.raises(
            CacheError, match=rf"_cuda.*\.so is broken: {words}.*; copy the folder again, or run `fastflow"
        ):
            read(compiled)
    monkeypatch.setenv("FASTFLOW_CACHE_DIR", str(compiled))
    found = doctor.cache() or {}
    assert found["cuda"] == [] and words in found["problems"][0]


def test_what_doctor_says_of_a_module(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFLOW_CACHE_DIR", str(compiled))
    found = {"folder": str(compiled), "archs": [], "cuda": ["sm_80", "PTX of compute_80"], "problems": []}
    assert doctor.cache() == found


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="FASTFLOW_CACHE_DIR: wanted a folder that .* got the file"):
        module.find(tmp_path / "file")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_manifest_that_is_none(compiled: Path, text: str) -> None:
    (compiled / "cuda" / "manifest.json").write_text(text)
    with pytest.raises(CacheError, match=r"manifest\.json (cannot be read|is no manifest)"):
        module.find(compiled)


def test_a_missing_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvcc, "find", lambda home=None: None)
    with pytest.raises(CompileError, match=r"nvcc is missing: looked in CUDA_HOME, .*`--backend triton`"):
        nvcc_aot.build(targets.find_all(["sm_80"]), tmp_path)


def test_an_installation_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc_aot, "ROOT", tmp_path)
    with pytest.raises(CompileError, match=r"csrc/ is not part of an installed fastflow"):
        nvcc_aot.build(targets.find_all(["sm_80"]), tmp_path)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["sm_90", "sm_120"], r"--arch: .*nvcc does not know sm_120; it knows sm_80, sm_90"),
        (["sm_90"], r"nvcc does not know compute_120; set CUDA_HOME to a toolkit of 12\.8"),
    ],
    ids=["target", "ptx"],
)
def test_an_nvcc_that_does_not_know_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], words: str
) -> None:
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho sm_80 sm_90\n")
    old.chmod(0o755)
    monkeypatch.setattr(_nvcc, "find", lambda home=None: str(old))
    monkeypatch.setattr(nvcc_aot, "tool", lambda name: name)
    with pytest.raises(CompileError, match=words):
        nvcc_aot.build(targets.find_all(asked), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_builder_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc_aot, "_BUILDER", "raise SystemExit('kernels.cu(1): error: no such thing')")
    with pytest.raises(CompileError, match=r"the CUDA module was not built: kernels\.cu\(1\): error: no such thing"):
        nvcc_aot._run_builder(tmp_path, ["80"])
