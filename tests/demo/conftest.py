"""The digits model and a small rollout of it, made once. Skipped, by name, where a package of the demo is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastflow as ff


@pytest.fixture(autouse=True)
def _one_thread(_fixed: None) -> None:
    """Quicker for a network as small as this, and much quicker where the cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_packages() -> None:
    for name in ("sklearn", "diffusers", "matplotlib"):
        pytest.importorskip(name, reason=f"the demo needs {name}: pip install 'fastflow[demo]'")


@pytest.fixture(scope="session")
def digits(demo_packages: None) -> Any:
    from fastflow.demo import digits

    return digits


@pytest.fixture(scope="session")
def loaded(digits: Any) -> Any:
    return digits.load_model()


@pytest.fixture(scope="session")
def trajectory(demo_packages: None) -> ff.Trajectory:
    """Prompts 3, 8 and 3 again, three samples each, four steps."""
    from fastflow.demo.run import DigitsRollout

    return DigitsRollout(prompts=[3, 8, 3], group=3, steps=4, progress=False).run()
