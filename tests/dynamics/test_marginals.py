"""Every dynamics must end in the data distribution: exactly known chains for Gaussians, Monte Carlo for a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from fastflow.dynamics import (
    CPS,
    ODE,
    DanceSDE,
    DPMSolverSDE,
    Dynamics,
    FlowDDIM,
    FlowSDE,
    TableSDE,
    WanSDE,
    sigma_schedule,
)
from fastflow.dynamics.base import Grid, Rows
from fastflow.dynamics.forms import reverse_sde
from tests.dynamics.problems import Gaussian, Mixture, final_moments, final_position, sample
from tests.tolerance import FLOAT64, ORDER_RATIO, STANDARD_ERRORS

DATA = Gaussian(center=0.7, spread=0.5)


def shrinking_cps(steps: int) -> CPS:
    """A CPS step's noise is sigma' sin(theta) whatever the step's length: the limit needs sin^2(theta) ~ 1 / T."""
    return CPS(2.0 / math.pi * math.asin(math.sqrt(1.0 / steps)))


STOCHASTIC: dict[str, Callable[[int], Dynamics]] = {
    "flow_sde": lambda steps: FlowSDE(0.7),
    "flow_sde_per_step": lambda steps: FlowSDE(torch.linspace(0.4, 0.9, steps)),
    "dance_sde": lambda steps: DanceSDE(0.8),
    "wan_sde": lambda steps: WanSDE(),
    "table_sde": lambda steps: TableSDE(torch.linspace(1.2, 0.3, steps)),
    "cps": shrinking_cps,
    "flow_ddim": lambda steps: FlowDDIM(0.7),
    "dpm_solver_sde": lambda steps: DPMSolverSDE(),
}


@dataclass(frozen=True)
class WithoutCorrection(Dynamics):
    """A wrong reverse SDE: noise, but no s^2 / (2 sigma) drift to pay for it."""

    right: Dynamics

    def rows(self, grid: Grid) -> Rows:
        dt = grid.sigma_next - grid.sigma
        return Rows(torch.ones_like(dt), dt, self.right.rows(grid).std)


@dataclass(frozen=True)
class HalfCorrection(Dynamics):
    """A wrong reverse SDE: the correction is in a, but not in b."""

    diffusion: float = 0.8

    def rows(self, grid: Grid) -> Rows:
        right = reverse_sde(grid, torch.full_like(grid.sigma, self.diffusion))
        return Rows(right.a, grid.sigma_next - grid.sigma, right.std)


def variance_error(dynamics: Dynamics, steps: int, shift: float = 1.0) -> float:
    """Relative error of the variance at the end of a schedule from 0.95 to 0.02, where no coefficient is singular."""
    sigmas = sigma_schedule(steps, shift, sigma_max=0.95, sigma_min=0.02)
    mean, variance = final_moments(dynamics.transitions(sigmas), DATA)
    assert mean == pytest.approx(DATA.mean(float(sigmas[-1])), abs=FLOAT64)  # exact at every step length
    return variance / DATA.variance(float(sigmas[-1])) - 1.0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_gaussian_marginals_are_kept_to_first_order(name: str, shift: float) -> None:
    coarse, fine = (variance_error(STOCHASTIC[name](steps), steps, shift) for steps in (2000, 4000))
    assert coarse / fine == pytest.approx(2.0, rel=ORDER_RATIO)
    assert abs(2.0 * fine - coarse) < abs(fine) / 5.0  # Richardson: nothing is left when the step length goes to 0


@pytest.mark.parametrize("name", STOCHASTIC)
def test_gaussian_marginal_from_one_to_zero(name: str) -> None:
    """The whole way, first and last step included."""
    steps = 4000
    mean, variance = final_moments(STOCHASTIC[name](steps).transitions(sigma_schedule(steps)), DATA)
    assert mean == pytest.approx(DATA.center, abs=FLOAT64)
    assert variance == pytest.approx(DATA.spread**2, rel=0.005)


def test_wrong_coefficients_are_seen() -> None:
    for dynamics in (WithoutCorrection(FlowSDE(0.7)), WithoutCorrection(DanceSDE(0.8)), HalfCorrection()):
        sigmas = sigma_schedule(4000, sigma_max=0.95, sigma_min=0.02)
        mean, variance = final_moments(dynamics.transitions(sigmas), DATA)
        wrong_mean = abs(mean / DATA.mean(0.02) - 1.0)
        assert max(wrong_mean, abs(variance / DATA.variance(0.02) - 1.0)) > 0.05


def test_cps_keeps_a_bias_at_a_fixed_noise_level() -> None:
    """More steps do not cure it: each step's noise is as large as before. Too little variance is left."""
    some, more = (variance_error(CPS(0.3), steps) for steps in (4000, 8000))
    assert more < -0.02 and some / more < 1.1


@pytest.mark.parametrize("name", STOCHASTIC)
def test_mixture_is_reached(name: str) -> None:
    steps, count = 400, 16_384
    data = Mixture()
    ends = sample(STOCHASTIC[name](steps).transitions(sigma_schedule(steps)), data, count, seed=7)
    mean, variance, fourth = data.moments
    assert abs(float(ends.mean()) - mean) < STANDARD_ERRORS * math.sqrt(variance / count)
    assert abs(float(ends.var()) - variance) < STANDARD_ERRORS * math.sqrt((fourth - variance**2) / count)
    weight = data.weights[1]
    assert abs(float((ends > 0.25).double().mean()) - weight) < STANDARD_ERRORS * math.sqrt(
        weight * (1 - weight) / count
    )


def test_mixture_sees_wrong_coefficients() -> None:
    steps, count = 400, 16_384
    data = Mixture()
    ends = sample(WithoutCorrection(DanceSDE(0.8)).transitions(sigma_schedule(steps)), data, count, seed=7)
    _, variance, fourth = data.moments
    assert abs(float(ends.var()) - variance) > STANDARD_ERRORS * math.sqrt((fourth - variance**2) / count)


@pytest.mark.parametrize(("dynamics", "order"), [(ODE(), 1), (ODE("dpmpp", 1), 1), (ODE("dpmpp", 2), 2)])
def test_ode_reaches_its_closed_form_end_at_its_order(dynamics: ODE, order: int) -> None:
    errors = []
    for steps in (320, 640, 1280):
        tr = dynamics.transitions(sigma_schedule(steps, sigma_max=0.95, sigma_min=0.05))
        errors.append(final_position(tr, DATA, 1.3) - DATA.ode(1.3, 0.95, 0.05))
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(2.0**order, rel=ORDER_RATIO)


def test_second_order_is_better_on_whole_schedules() -> None:
    for shift in (1.0, 3.0):
        ends = []
        for dynamics in (ODE(), ODE("dpmpp", 2)):
            tr = dynamics.transitions(sigma_schedule(20, shift))
            ends.append(abs(final_position(tr, DATA, 1.3) - DATA.ode(1.3, 1.0, 0.0)))
        assert ends[1] < ends[0] / 4.0
