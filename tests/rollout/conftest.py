"""A small real network, conditions of three prompts, and a schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastflow as ff
from tests.rollout import networks


@pytest.fixture(autouse=True)
def _one_thread(_fixed: None) -> None:
    """Layers of a few thousand weights: a second thread would only wait for the first."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd3() -> ff.models.SD3:
    """float32, one layer. No test changes it."""
    return ff.models.SD3(networks.transformer())


@pytest.fixture
def condition() -> dict[str, Any]:
    return networks.conditions()


@pytest.fixture
def negative() -> dict[str, Any]:
    """Of the condition's length, one for all prompts."""
    return networks.conditions(1, seed=1)


@pytest.fixture
def sigmas() -> ff.Sigmas:
    return ff.sigma_schedule(10, shift=3.0)
