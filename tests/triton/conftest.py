"""These tests run the Triton kernels: in Triton's interpreter, in a process of their own started with TRITON_INTERPRET=1 (the
variable changes `triton.jit` when it is imported), or on an NVIDIA GPU without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fastflow.backends import triton


@pytest.fixture(autouse=True, scope="session")
def _runnable() -> None:
    reason = triton.unavailable()
    if reason is not None:
        pytest.skip(f"{reason}; without a GPU, run TRITON_INTERPRET=1 pytest tests/triton")


@pytest.fixture
def launched_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes what every launch is configured with, in the interpreter and on any GPU, whether or not it has a file."""
    from fastflow.kernels import config

    interpreted, for_device = config.INTERPRETED, config.for_device

    def change(**fields: Any) -> None:
        monkeypatch.setattr(config, "INTERPRETED", replace(interpreted, **fields))
        monkeypatch.setattr(config, "for_device", lambda device: replace(for_device(device), **fields))

    return change


@pytest.fixture
def small_blocks(launched_with: Callable[..., None]) -> None:
    """One tile a program, so that short rows take the two-pass path."""
    from fastflow.kernels import config

    launched_with(block=config.TILE)
