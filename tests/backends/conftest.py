from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastflow.backends import cpu


@pytest.fixture
def module() -> Any:
    """fastflow._cpu, skipped where it was not built."""
    reason = cpu.unavailable()
    if reason is not None:
        pytest.skip(f"backend cpu: {reason}")
    import fastflow._cpu

    return fastflow._cpu


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest, module: Any) -> Iterator[str]:
    """Runs the test with one instruction set."""
    if request.param not in module.isas():
        pytest.skip(f"this processor has no {request.param}, or the module was built without it")
    before = module.isa()
    module.set_isa(request.param)
    yield request.param
    module.set_isa(before)
