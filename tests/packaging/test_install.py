"""However fastflow is installed, the same thing is imported."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.environments import Environment, run
from tests.packaging.repository import ROOT

needs_compiler = pytest.mark.skipif(
    all(shutil.which(name) is None for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler"
)
SAME = ("version", "names", "kernels", "step")
HEAVY = {"triton", "diffusers", "transformers", "xformers", "sklearn", "matplotlib", "typer", "rich"}


@pytest.fixture(scope="session")
def bare(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a bare checkout on PYTHONPATH gives: the yardstick of the other installations."""
    environment = Environment.create(tmp_path_factory.mktemp("bare_run") / "run")
    return environment.probe(PYTHONPATH=str(checkout))


def test_bare_checkout(bare: dict[str, Any], checkout: Path) -> None:
    assert bare["folder"] == str(checkout / "fastflow")
    assert bare["kernels_folder"] == str(checkout / "kernels")
    assert bare["kernels"]


def test_import_loads_nothing_heavy(bare: dict[str, Any]) -> None:
    assert HEAVY.isdisjoint(bare["loaded"])
    assert not {"fastflow._cpu", "fastflow._cuda"} & set(bare["loaded"])


def test_wheel(from_wheel: Environment, bare: dict[str, Any]) -> None:
    found = from_wheel.probe()
    assert Path(found["folder"]).is_relative_to(from_wheel.folder)
    assert found["kernels_folder"] == str(Path(found["folder"]) / "kernels")
    assert {key: found[key] for key in SAME} == {key: bare[key] for key in SAME}
    assert HEAVY.isdisjoint(found["loaded"])


def test_editable(editable: tuple[Environment, Path], bare: dict[str, Any]) -> None:
    environment, source = editable
    found = environment.probe()
    assert found["folder"] == str(source / "fastflow")
    assert found["kernels_folder"] == str(source / "kernels")
    assert {key: found[key] for key in SAME} == {key: bare[key] for key in SAME}


def test_editable_sees_edits(editable: tuple[Environment, Path]) -> None:
    environment, source = editable
    (source / "kernels" / "added_later.py").write_text("VALUE = 7\n")
    program = "import fastflow.kernels.added_later as m; print(m.VALUE)"
    assert run(environment.python, "-c", program, cwd=environment.folder).stdout == "7\n"


@needs_compiler
def test_the_cpu_module_is_compiled(from_wheel: Environment, editable: tuple[Environment, Path]) -> None:
    assert from_wheel.probe()["cpu"] is None
    assert editable[0].probe()["cpu"] is None


def test_without_a_compiler_it_installs_and_says_so(
    without_compiler: tuple[Environment, str], bare: dict[str, Any]
) -> None:
    environment, output = without_compiler
    found = environment.probe()
    assert {key: found[key] for key in SAME} == {key: bare[key] for key in SAME}
    assert "compiler" in found["cpu"]
    assert "without" in output and "compiler" in output
    assert "compiler" in environment.fastflow("doctor")


def test_kernels_leaves_the_name_to_its_owner(checkout: Path, tmp_path: Path) -> None:
    owner = tmp_path / "site" / "kernels"
    owner.mkdir(parents=True)
    (owner / "__init__.py").write_text("def get_kernel(): return 'theirs'\n")
    environment = Environment.create(tmp_path / "run")
    program = "import fastflow.kernels; from kernels import get_kernel; print(get_kernel())"
    path = f"{checkout}:{owner.parent}"
    assert run(environment.python, "-c", program, cwd=environment.folder, PYTHONPATH=path).stdout == "theirs\n"
    assert not (ROOT / "kernels" / "__init__.py").exists()
