"""Fixtures for all tests: fixed seeds, two threads, and the backends that this process can run on CPU tensors."""

from __future__ import annotations

import pytest
import torch

from fastflow import backends


@pytest.fixture(autouse=True)
def _fixed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend's name; skipped where this machine lacks it, with the backend's own words."""
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return str(request.param)
