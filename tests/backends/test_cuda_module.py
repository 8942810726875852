"""Backend cuda where its module is absent, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastflow.backends import cuda
from tests.backends.calls import call, guided


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """unavailable() of a package without the module, beside a build record that the test writes."""

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'fastflow._cuda'")

    def answer(record: dict[str, Any] | None) -> str:
        if record is not None:
            (tmp_path / "_build.json").write_text(json.dumps(record))
        return str(cuda.unavailable.__wrapped__())

    monkeypatch.setattr(cuda, "_module", missing)
    monkeypatch.setattr(cuda, "__file__", str(tmp_path / "backends" / "cuda.py"))
    return answer


def test_absent_and_never_built(absent: Any) -> None:
    assert "FASTFLOW_CUDA=1 pip install" in absent(None)


def test_absent_with_the_reason_of_the_build(absent: Any) -> None:
    assert "no nvcc found" in absent({"cuda": {"ok": False, "reason": "no nvcc found"}})


def test_absent_though_built(absent: Any) -> None:
    assert "install again" in absent({"cuda": {"ok": True, "reason": None}})


def machine(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refusal: str | None) -> str | None:
    """unavailable() with the module there, on a GPU of `capability` whose driver says `refusal` to the kernels."""
    module = SimpleNamespace(refusal=lambda device: refusal, architectures=lambda: "sm_90")
    monkeypatch.setattr(cuda, "_module", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "_unfit", cuda._unfit.__wrapped__)
    return cuda.unavailable.__wrapped__()


def test_a_gpu_that_the_module_was_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine(monkeypatch, (9, 0), None) is None


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compute capability 7.5: wanted 8.0" in str(machine(monkeypatch, (7, 5), None))


def test_a_gpu_that_the_module_was_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = str(machine(monkeypatch, (12, 0), "no kernel image is available"))
    assert "compiled for sm_90" in reason and "12.0: no kernel image" in reason and "FASTFLOW_CUDA_ARCHS" in reason


def test_one_of_two_gpus_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (7, 5), 1: (9, 0)}
    assert machine(monkeypatch, (9, 0), None) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert cuda.unavailable.__wrapped__() is None  # type: ignore[attr-defined]
    assert "GPU 0 has compute capability 7.5" in str(cuda._unfit(0)) and cuda._unfit(1) is None


def test_no_context_is_opened_on_gpus_like_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    assert machine(monkeypatch, (9, 0), None) is None
    module = SimpleNamespace(refusal=asked.append, architectures=lambda: "sm_90")
    monkeypatch.setattr(cuda, "_module", lambda: module)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    assert cuda.unavailable.__wrapped__() is None and asked == [5]  # type: ignore[attr-defined]


def test_refusals_name_the_value() -> None:
    assert "sample is on cpu" in str(cuda.refuse(call()))
    assert cuda.refuse_values(call()) is None
    assert "velocity" in str(cuda.refuse_values(call(product_dtype="velocity")))
    assert "noise is torch.float64" in str(cuda.refuse_values(call(noise=torch.zeros(3, 112, dtype=torch.float64))))
    assert "coef is torch.float64" in str(cuda.refuse_values(call(coef=torch.zeros(1, 16, dtype=torch.float64))))
    wide = guided(1, 4097, rescale="token", token=(1, 4097, 1))
    assert "4096 channels, and these have 4097" in str(cuda.refuse_values(wide))
