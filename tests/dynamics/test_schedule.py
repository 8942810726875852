"""Schedules: values, refusals, re-spacing, and what a `Sigmas` survives."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflow.dynamics import ODE, Sigmas, sigma_schedule, sigmas_from, sub_grid
from tests.tolerance import FLOAT64


@given(st.integers(1, 60), st.floats(0.2, 12.0))
def test_shifted_linspace(steps: int, shift: float) -> None:
    sigmas = sigma_schedule(steps, shift)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (steps + 1,) and sigmas.steps == steps
    assert float(sigmas[0]) == 1.0 and float(sigmas[-1]) == 0.0
    for i, value in enumerate(sigmas.tolist()):
        time = 1.0 - i / steps
        assert value == pytest.approx(shift * time / (1.0 + (shift - 1.0) * time), rel=FLOAT64, abs=FLOAT64)
    assert torch.equal(sigmas.timesteps, sigmas[:-1] * 1000)
    ODE().transitions(sigmas)


def test_a_part_of_the_path() -> None:
    assert sigma_schedule(2, sigma_max=0.8, sigma_min=0.2).tolist() == pytest.approx([0.8, 0.5, 0.2])


def test_operations_give_plain_tensors() -> None:
    sigmas = sigma_schedule(4)
    for result in (
        sigmas[1:],
        sigmas * 2,
        sigmas.float(),
        sigmas.clone(),
        sigmas.detach(),
        torch.cat([sigmas, sigmas]),
    ):
        assert type(result) is torch.Tensor
    assert isinstance(sigmas, torch.Tensor) and sigmas.device.type == "cpu"
    assert "steps=4" in repr(sigmas) and sigmas.hash in repr(sigmas) and "..." in repr(sigma_schedule(40))


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_keep_everything(clone) -> None:  # type: ignore[no-untyped-def]
    full = Sigmas([1.0, 0.7, 1 / 3, 0.0], timesteps=[999.0, 700.5, 333.3])
    for sigmas in (full, sub_grid(full, 1, 1)):
        other = clone(sigmas)
        assert type(other) is Sigmas and torch.equal(other, sigmas) and torch.equal(other.timesteps, sigmas.timesteps)
        assert other.hash == sigmas.hash and (other.full is None) == (sigmas.full is None)


def test_hash_stands_for_values_and_timesteps() -> None:
    one = Sigmas([1.0, 0.5, 0.0])
    assert one.hash == Sigmas(torch.tensor([1.0, 0.5, 0.0])).hash and len(one.hash) == 12
    assert one.hash != Sigmas([1.0, 0.5, 0.0], [1000.0, 501.0]).hash != Sigmas([1.0, 0.5000001, 0.0]).hash


@pytest.mark.parametrize(
    ("values", "timesteps", "message"),
    [
        ([1.0], None, r"sigmas: wanted \[T \+ 1\]"),
        ([[1.0, 0.0]], None, r"shape \[1, 2\]"),
        ([1.0, float("nan"), 0.0], None, "sigmas: wanted finite"),
        ([1.0, -0.1], None, "sigmas: wanted finite values >= 0"),
        ([1.0, 0.4, 0.5, 0.0], None, "sigmas: wanted falling values, got 0.4 before 0.5"),
        ([1.0, 0.5, 0.0], [1000.0], "timesteps: wanted 2 finite values"),
        ([1.0, 0.0], [float("inf")], "timesteps: wanted 1 finite"),
    ],
)
def test_bad_sigmas(values: list[float], timesteps: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sigmas(values, timesteps)


def test_sigmas_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="sigmas: wanted a tensor or numbers, got str"):
        Sigmas("karras")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: wanted at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps: wanted an int, got float"),
        ({"steps": 4, "shift": 0.0}, ValueError, "shift: wanted a positive number"),
        ({"steps": 4, "shift": float("nan")}, ValueError, "shift: wanted a positive number"),
        ({"steps": 4, "sigma_max": 1.2}, ValueError, "sigma_min, sigma_max: wanted 0 <="),
        ({"steps": 4, "sigma_min": 1.0}, ValueError, "sigma_min, sigma_max: wanted 0 <="),
    ],
)
def test_bad_schedule(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sigma_schedule(**kwargs)


@given(st.integers(2, 30), st.floats(0.5, 8.0), st.data())
def test_sub_grid(steps: int, shift: float, data: st.DataObject) -> None:
    sigmas = sigma_schedule(steps, shift)
    start = data.draw(st.integers(0, steps - 1))
    evaluations = data.draw(st.integers(1, steps + 2))
    for spacing in ("sigma", "schedule"):
        grid = sub_grid(sigmas, start, evaluations, spacing)
        assert float(grid[0]) == float(sigmas[start]) and float(grid[-1]) == 0.0
        assert grid.steps == min(evaluations, steps - start) and grid.full is sigmas
        assert torch.allclose(grid.timesteps, grid[:-1] * 1000, rtol=FLOAT64)
        ODE().transitions(grid)
        if evaluations >= steps - start:
            assert torch.equal(grid[:], sigmas[start:])
        elif spacing == "sigma":
            gaps = grid[:-1] - grid[1:]
            assert torch.allclose(gaps, gaps[0].expand_as(gaps), rtol=FLOAT64)


def test_sub_grid_even_in_the_schedule_takes_every_nth_point() -> None:
    sigmas = Sigmas([1.0, 0.9, 0.7, 0.6, 0.3, 0.2, 0.0], timesteps=[999.0, 900.0, 701.0, 600.0, 300.0, 200.0])
    assert sub_grid(sigmas, 0, 3, "schedule").tolist() == [1.0, 0.7, 0.3, 0.0]
    assert sub_grid(sigmas, 0, 3, "schedule").timesteps.tolist() == [999.0, 701.0, 300.0]
    assert sub_grid(sigmas, 2, 2, "schedule").tolist() == [0.7, 0.3, 0.0]
    assert sub_grid(sigmas, 1, 2, "schedule").tolist() == pytest.approx([0.9, (0.6 + 0.3) / 2, 0.0])
    assert sub_grid(sigmas, 1, 2).tolist() == pytest.approx([0.9, 0.45, 0.0])
    assert sub_grid(sigmas, 1, 2).timesteps.tolist() == pytest.approx([900.0, 450.0])
    assert sub_grid(sub_grid(sigmas, 1, 3), 1, 1).full is sigmas
    assert sub_grid([1.0, 0.5, 0.0], 0, 1).tolist() == [1.0, 0.0]


def test_sub_grid_of_integer_timesteps() -> None:
    grid = sub_grid(Sigmas([801, 601, 401, 201, 1, 0]), 0, 3)
    assert grid.tolist() == [801.0, 534.0, 267.0, 0.0] and grid.timesteps.tolist() == [801.0, 534.0, 267.0]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((4, 2), ValueError, "start: wanted a step of the schedule, 0 to 3, got 4"),
        ((-1, 2), ValueError, "start: wanted a step"),
        ((0, 0), ValueError, "evaluations: wanted at least 1, got 0"),
        ((0, 2.0), TypeError, "evaluations: wanted an int, got float"),
        ((0, 2, "karras"), ValueError, "spacing: wanted"),
    ],
)
def test_bad_sub_grid(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sub_grid(sigma_schedule(4), *args)


def test_a_scheduler_that_is_none() -> None:
    with pytest.raises(ValueError, match="scheduler: wanted a diffusers scheduler"):
        sigmas_from(object())
    bare = SimpleNamespace(config=SimpleNamespace(), timesteps=torch.ones(2), num_inference_steps=2)
    with pytest.raises(ValueError, match="neither sigmas nor alphas_cumprod"):
        sigmas_from(bare)
