"""The eager loss that `bench matching` is timed against computes the same thing, and the bytes are those of the tensors."""

from __future__ import annotations

import pytest
import torch

import fastflow as ff
from bench import baselines, matching
from bench.registry import Mismatch

SHAPE = (3, 4, 8, 8)


def test_it_passes_its_check(backend: str) -> None:
    matching.check(matching.inputs(SHAPE), backend, ())


def test_the_check_sees_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "BETA", 0.501)
    expected = matching.fused(matching.inputs(SHAPE), "reference")()
    monkeypatch.setattr(matching, "BETA", 0.5)
    monkeypatch.setattr(matching, "fused", lambda data, backend: lambda: expected)
    with pytest.raises(Mismatch, match="of eager autograd"):
        matching.check(matching.inputs(SHAPE), "reference", ())


def test_the_noise_is_that_of_the_noisy_samples() -> None:
    data = matching.inputs(SHAPE, number=3)
    assert torch.equal(data["noisy"], ff.noised(data["clean"], data["sigma"], data["noise"]))


def test_bytes_are_those_of_the_tensors() -> None:
    data = matching.inputs(SHAPE)
    moved = 2 * sum(data[name].nbytes for name in matching.READ) + data["velocity"].nbytes
    assert matching.ENTRY.bytes_moved(matching.ENTRY.variant(matching.FUSED), SHAPE) == moved


def test_the_eager_loss_of_a_perfect_velocity() -> None:
    """Both predictions are the clean sample, but for rounding, which is below the least divisor."""
    data = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in matching.inputs(SHAPE).items()}
    target = (data["noisy"] - data["clean"]) / data["sigma"].view(-1, 1, 1, 1)
    loss = baselines.nft_loss(
        data["noisy"], data["clean"], target, target, data["sigma"], data["advantage"], matching.BETA, matching.MOST
    )
    assert float(loss) < torch.finfo(torch.float32).eps
