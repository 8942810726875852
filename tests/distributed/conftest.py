"""What a pair of processes needs of the installation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(autouse=True, scope="session")
def _processes() -> None:
    """In a fixture: a conftest of a folder that is named on the command line cannot skip."""
    pytest.importorskip("diffusers", reason="needs diffusers: the network in shards is one of its own")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo: no process group on CPU tensors")


@pytest.fixture(autouse=True)
def _one_thread(_fixed: None) -> None:
    torch.set_num_threads(1)
