"""Checkouts, distributions and environments that several tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.packaging.environments import OFFLINE, PIP, Environment, copy_checkout, run


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, in which nothing was built and nothing is built."""
    return copy_checkout(tmp_path_factory.mktemp("bare") / "checkout")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fastflow-*.tar.gz, made from a checkout."""
    source = copy_checkout(tmp_path_factory.mktemp("sdist") / "checkout")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", "dist", ".", cwd=source)
    return next((source / "dist").glob("fastflow-*.tar.gz"))


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fastflow-*.whl, made from the source distribution: what is missing there is missing here."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, *PIP, "wheel", *OFFLINE, "--wheel-dir", out, sdist, cwd=out)
    return next(out.glob("fastflow-*.whl"))


@pytest.fixture(scope="session")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment.create(tmp_path_factory.mktemp("from_wheel") / "run")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, str]:
    """`pip install .` of a checkout on a machine whose compiler is not there, and pip's output."""
    folder = tmp_path_factory.mktemp("without_compiler")
    source, environment = copy_checkout(folder / "checkout"), Environment.create(folder / "run")
    nowhere = str(folder / "nowhere" / "c++")
    return environment, environment.install(source, CXX=nowhere, CC=nowhere)


@pytest.fixture(scope="session")
def editable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """`pip install -e .`, and the checkout it points to."""
    folder = tmp_path_factory.mktemp("editable")
    source, environment = copy_checkout(folder / "checkout"), Environment.create(folder / "run")
    environment.install("--editable", source)
    return environment, source
