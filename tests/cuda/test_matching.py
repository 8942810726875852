"""A matching loss on CUDA: its row means and their gradient have the bits of plain torch and of the cpu backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastflow.backends import cpu
from fastflow.backends import matching as plain
from fastflow.backends.base import StepCall
from tests.backends.calls import FLOATS, call, rows, same
from tests.cuda.test_step import COUNTERS, LENGTHS, SEEDS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SOURCES = ("drawn", "noise", "given")
OTHERS = {"none": (), "old": ("old_mean",), "reference": ("ref_velocity",), "both": ("old_mean", "ref_velocity")}
BETA = 0.7


def made(
    batch: int, numel: int, source: str = "drawn", others: str = "both", *, masked: bool = False, gap: int = 0,
    clean: Any = F32, velocity: Any = BF16, other: Any = None,
) -> StepCall:  # fmt: skip
    """A call of a matching loss; `other` is the dtype of the old and the reference velocity, velocity's unless it is said."""
    base = call(
        batch, numel, gap=gap, sample=rows(batch, numel, clean, gap), velocity=rows(batch, numel, velocity, gap)
    )
    for name in OTHERS[others]:
        setattr(base, name, rows(batch, numel, other or velocity, gap))
    if masked:
        base.mask = (torch.rand(batch, numel + gap) < 0.6)[:, gap // 2 : gap // 2 + numel]
    if source == "noise":
        return replace(base, seeds=None, step=None, noise=rows(batch, numel, velocity, gap))
    return base if source == "drawn" else replace(base, given=rows(batch, numel, F16, gap))


def run(backend: Any, base: StepCall, grad: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    means, gradient = torch.full((6, base.batch), torch.nan), torch.full_like(base.velocity, torch.nan)
    backend.matching(base, beta, means)
    backend.matching_backward(base, grad, gradient)
    return means, gradient


def check(device: Any, base: StepCall, beta: float = BETA) -> tuple[Tensor, Tensor]:
    grad = torch.randn(3, base.batch)
    found = run(device, base, grad, beta)
    for backend in (plain, cpu) if cpu.unavailable() is None else (plain,):
        for name, actual, expected in zip(("means", "gradient"), found, run(backend, base, grad, beta), strict=True):
            count = int((actual != expected).sum())
            assert same(actual, expected), f"{name}: {count} of {actual.numel()} differ from {backend.__name__}"
    return found


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("numel", LENGTHS)
def test_row_lengths(device: Any, numel: int, masked: bool, others: str) -> None:
    batch = 2 if numel > 1000 else 11
    means, _ = check(device, made(batch, numel, others=others, masked=masked))
    check(device, made(batch, numel, others=others, masked=masked, velocity=F32))
    assert bool(means[1].any()) == (others in ("old", "both"))
    assert bool(means[5].any()) == (others in ("reference", "both"))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("velocity", FLOATS)
@pytest.mark.parametrize("clean", FLOATS)
def test_dtypes(device: Any, clean: torch.dtype, velocity: torch.dtype, source: str) -> None:
    check(device, made(2, 2304, source, clean=clean, velocity=velocity))
    check(device, made(2, 2304, source, clean=clean, velocity=velocity, other=F16, masked=True))
    check(device, made(2, 2304, source, "old", clean=clean, velocity=velocity, other=F32))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("gap", [1, 2, 8, 13])
@pytest.mark.parametrize("numel", [300, 2500])
def test_strided_rows(device: Any, numel: int, gap: int, source: str) -> None:
    check(device, made(3, numel, source, gap=gap, masked=True))
    check(device, made(3, numel, source, gap=gap))


@pytest.mark.parametrize(("step", "stream", "offset"), COUNTERS)
@pytest.mark.parametrize("velocity", [BF16, F32])
def test_noise_is_drawn_again(device: Any, velocity: torch.dtype, step: int, stream: int, offset: int) -> None:
    base = made(len(SEEDS), 2049, velocity=velocity)
    check(device, replace(base, seeds=SEEDS, step=torch.tensor([step]), stream=stream, offset=offset))
    check(device, replace(base, seeds=SEEDS, step=torch.arange(len(SEEDS)) + step, stream=stream, offset=offset))


@pytest.mark.parametrize("beta", [1e-3, 0.5, 1.0, 1.7, 50.0])
@pytest.mark.parametrize("others", OTHERS)
def test_beta(device: Any, others: str, beta: float) -> None:
    check(device, made(3, 2304, others=others), beta)


@pytest.mark.parametrize("velocity", [BF16, F32])
def test_a_row_without_elements_that_count(device: Any, velocity: torch.dtype) -> None:
    base = made(3, 2304, masked=True, velocity=velocity)
    base.mask[1] = False  # type: ignore[index]
    means, gradient = check(device, base)
    assert not means[:, 1].any() and not gradient[1].any() and gradient[2].any()


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite(device: Any, value: float, others: str) -> None:
    """They reach their own row, and only where they count."""
    base = made(3, 2304, others=others, masked=True)
    base.velocity[:2, 700] = value
    base.mask[0, 700], base.mask[1, 700] = False, True  # type: ignore[index]
    means, _ = check(device, base)
    assert bool(means[:, [0, 2]].isfinite().all()) and not means[0, 1].isfinite()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("others", ["none", "both"])
def test_a_row_whose_tiles_are_added_in_rounds(device: Any, others: str, masked: bool) -> None:
    """512 tiles are staged at a time."""
    check(device, made(1, 512 * 2048 + 5000, others=others, masked=masked))


def test_a_row_does_not_depend_on_the_others(device: Any) -> None:
    base = made(5, 4100)
    whole = run(device, base, torch.ones(3, 5), BETA)
    names = ("sample", "velocity", "old_mean", "ref_velocity", "seeds")
    part = replace(base, batch=2, **{name: getattr(base, name)[3:] for name in names})
    alone = run(device, part, torch.ones(3, 2), BETA)
    assert torch.equal(whole[0][:, 3:], alone[0]) and torch.equal(whole[1][3:], alone[1])


def test_no_rows_and_no_elements(device: Any) -> None:
    run(device, made(0, 64), torch.ones(3, 0), BETA)
    assert not run(device, made(2, 0), torch.ones(3, 2), BETA)[0].any()


@pytest.mark.parametrize("source", SOURCES)
def test_rows_without_elements(device: Any, source: str) -> None:
    base, means = made(3, 0, source), torch.full((6, 3), 7.0)
    device.matching(base, BETA, means)
    assert torch.equal(means, torch.zeros(6, 3))
    device.matching_backward(base, torch.ones(3, 3), torch.empty_like(base.velocity))
