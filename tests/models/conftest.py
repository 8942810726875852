"""These tests run networks of a few thousand weights."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _networks() -> None:
    """In a fixture: a conftest of a folder that is named on the command line cannot skip."""
    pytest.importorskip("diffusers", reason="needs diffusers: these are its networks")


@pytest.fixture(autouse=True)
def _one_thread(_fixed: None) -> None:
    """A second thread would only wait for the first."""
    torch.set_num_threads(1)
