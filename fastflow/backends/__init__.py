"""Which backend runs a call: by name it runs or raises, under "auto" the first that can does."""

from __future__ import annotations

import functools
import importlib
from typing import cast

import torch

from ..errors import BackendError
from .base import Backend, StepCall

NAMES = ("reference", "cpu", "triton", "cuda")
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


@functools.cache
def load(name: str) -> Backend:
    check_name(name)
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def unavailable(name: str) -> str | None:
    """Why backend `name` cannot run on this machine, in words; None if it can."""
    return load(name).unavailable()


def report() -> list[tuple[str, str | None]]:
    """(name, reason or None) of every backend, for `fastflow doctor`."""
    return [(name, unavailable(name)) for name in NAMES]


def check_name(name: str) -> None:
    """Raises ValueError for a backend that does not exist."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f'backend: wanted "auto" or one of {", ".join(NAMES)}, got {name!r}')


def require(name: str) -> None:
    """Raises ValueError for a backend that does not exist, BackendError for one that cannot run on this machine."""
    check_name(name)
    absent = None if name == "auto" else unavailable(name)
    if absent is not None:
        raise BackendError(f'backend="{name}" cannot run here: {absent}. `fastflow doctor` lists what can.')


def select(name: str, device: torch.device, call: StepCall) -> Backend:
    """The backend for this call. Raises BackendError where a named one cannot run here, or refuses."""
    if name == "auto":
        for candidate in AUTO.get(device.type, ("reference",)):
            if unavailable(candidate) is None and load(candidate).refuse(call) is None:
                return load(candidate)
        return load("reference")
    require(name)
    backend = load(name)
    reason = backend.refuse(call)
    if reason is not None:
        raise BackendError(f'backend="{name}" refuses this call: {reason}. Change that, or use backend="auto".')
    return backend
