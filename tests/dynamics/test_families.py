"""Knobs and schedules that fit, and those that do not; DDIM's own formulas; values that travel."""

from __future__ import annotations

import pickle

import pytest
import torch

from fastflow.dynamics import (
    CPS,
    DDIM,
    ODE,
    DanceSDE,
    DPMSolverSDE,
    Dynamics,
    FlowDDIM,
    FlowSDE,
    TableSDE,
    WanSDE,
    sigma_schedule,
    sub_grid,
)
from tests.tolerance import FLOAT64

SIGMAS = sigma_schedule(5, shift=3.0)
ALPHAS = torch.cumprod(1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
ALL: list[Dynamics] = [
    FlowSDE(), FlowSDE([0.1, 0.2, 0.3, 0.4, 0.5]), DanceSDE(), WanSDE(), TableSDE([0.5] * 5), CPS(), FlowDDIM(),
    DPMSolverSDE(), ODE(), ODE("dpmpp", 2), DDIM(ALPHAS),
]  # fmt: skip


@pytest.mark.parametrize("dynamics", ALL, ids=lambda d: type(d).__name__)
def test_specifications_travel(dynamics: Dynamics) -> None:
    other = pickle.loads(pickle.dumps(dynamics))
    assert other == dynamics and hash(other) == hash(dynamics) and len(repr(dynamics)) < 120
    sigmas = [801, 601, 401, 201, 1, 0] if isinstance(dynamics, DDIM) else SIGMAS
    assert other.transitions(sigmas) == dynamics.transitions(sigmas)
    assert (
        dynamics.transitions(sigmas).score == dynamics.score == ("square" if isinstance(dynamics, CPS) else "gaussian")
    )


def test_noise_per_step() -> None:
    levels = [0.1, 0.2, 0.3, 0.4, 0.5]
    for family in (FlowSDE, DanceSDE, CPS, FlowDDIM):
        every = family(torch.tensor(levels, dtype=torch.float64)).transitions(SIGMAS)
        for i, level in enumerate(levels):
            assert torch.equal(every.table(torch.float64)[i], family(level).transitions(SIGMAS).table(torch.float64)[i])
    assert TableSDE([0.3] * 5).transitions(SIGMAS) == DanceSDE(0.3).transitions(SIGMAS)
    tail = TableSDE(levels).transitions(sub_grid(SIGMAS, 2, 3))  # the full schedule's psi, picked by sigma
    assert torch.equal(tail.std, TableSDE(levels).transitions(SIGMAS).std[2:])


def test_a_part_of_the_schedule_gives_the_same_rows() -> None:
    for dynamics in (FlowSDE(0.7), WanSDE(), CPS(0.7), DPMSolverSDE()):
        whole = dynamics.transitions(SIGMAS).table(torch.float64)
        assert torch.equal(dynamics.transitions(SIGMAS[:3], full=SIGMAS).table(torch.float64), whole[:2])
        assert torch.equal(dynamics.transitions(SIGMAS[2:], full=SIGMAS).table(torch.float64), whole[2:])


def test_multistep_history() -> None:
    history = ODE("dpmpp", 2).transitions(SIGMAS).history
    assert (history != 0).tolist() == [False, False, True, True, False]  # after sigma = 1 and into the end: order 1
    inner = ODE("dpmpp", 2).transitions([0.9, 0.7, 0.5, 0.2]).history
    assert (inner != 0).tolist() == [False, True, False]  # the last step is of order 1 wherever it ends
    assert ODE("dpmpp", 1).transitions(SIGMAS) == ODE().transitions(SIGMAS)
    tr = ODE("dpmpp", 2).transitions(SIGMAS)
    alpha = tr.a + tr.b / tr.sigma  # what is left of x when v = (x - clean) / sigma and clean = 0: the noise shrinks
    assert torch.allclose(alpha, tr.sigma_next / tr.sigma, rtol=FLOAT64)
    moved = (
        -tr.b / tr.sigma + tr.history
    )  # a fixed clean prediction of 1 moves by 1 - sigma' - (1 - sigma) sigma' / sigma
    assert torch.allclose(moved, 1 - tr.sigma_next / tr.sigma, rtol=FLOAT64)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_in_its_own_words(prediction: str, eta: float) -> None:
    steps = [981, 500, 21, 1, 0]
    tr = DDIM(ALPHAS, eta, prediction).transitions(steps)
    x, clean = torch.tensor([0.3], dtype=torch.float64), torch.tensor([-0.8], dtype=torch.float64)
    for i, (now, after) in enumerate(zip(ALPHAS[steps[:-1]], ALPHAS[steps[1:]], strict=True)):
        eps = (x - now.sqrt() * clean) / (1 - now).sqrt()
        v = {"epsilon": eps, "sample": clean, "v_prediction": now.sqrt() * eps - (1 - now).sqrt() * clean}[prediction]
        std = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
        mean = after.sqrt() * clean + (1 - after - std**2).sqrt() * eps
        still = after.sqrt() * clean + (1 - after).sqrt() * eps
        for got, wanted in (
            (tr.a[i] * x + tr.b[i] * v, mean),
            (tr.p[i] * x + tr.q[i] * v, clean),
            (tr.ode_a[i] * x + tr.ode_b[i] * v, still),
            (tr.std[i], std),
        ):
            assert torch.allclose(got, wanted, rtol=FLOAT64, atol=FLOAT64)
    assert tr.timestep.tolist() == steps[:-1] and (eta == 0.0 or float(tr.std[-1]) > 0.0)
    window = DDIM(ALPHAS, eta, prediction).transitions(steps, steps=[1])
    assert torch.equal(window.a[[0, 2]], tr.ode_a[[0, 2]]) and torch.equal(window.b[[0, 2]], tr.ode_b[[0, 2]])


def test_ddim_may_end_twice_at_zero() -> None:
    tr = DDIM(ALPHAS).transitions([500, 0, 0])
    assert tr.table()[1, [0, 1, 2]].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowSDE(-0.1), r"noise_level: wanted values finite and at least 0, got -0.1"),
        (lambda: FlowSDE(float("nan")), "noise_level: wanted"),
        (lambda: FlowSDE([0.1, float("inf")]), "noise_level: wanted"),
        (lambda: FlowSDE([]), r"noise_level: wanted one number or one per step, got shape \[0\]"),
        (lambda: DanceSDE(-1.0), "eta: wanted"),
        (lambda: CPS(1.2), "noise_level: wanted values from 0 to 1, got 1.2"),
        (lambda: FlowDDIM(1.1), "eta: wanted values from 0 to 1"),
        (lambda: TableSDE([0.1, -0.2]), "psi: wanted"),
        (lambda: ODE("heun"), "solver: wanted"),
        (lambda: ODE("euler", 2), 'order: wanted 1 for "euler", 1 or 2 for "dpmpp", got 2 for "euler"'),
        (lambda: ODE("dpmpp", 3), "order: wanted"),
        (lambda: DDIM(ALPHAS, prediction="flow"), "prediction: wanted"),
        (lambda: DDIM([1.5]), "alphas_cumprod: wanted"),
        (lambda: DDIM(ALPHAS, eta=2.0), "eta: wanted"),
        (lambda: FlowSDE([0.1, 0.2]).transitions(SIGMAS), "noise_level: wanted one number or 5 of them"),
        (lambda: TableSDE([0.1]).transitions(SIGMAS), "psi: wanted one number or 5 of them, one per step, got 1"),
        (lambda: ODE().transitions([1.0, 0.5, 0.5, 0.0]), "sigmas: wanted strictly falling values, got 0.5 twice"),
        (lambda: ODE().transitions([1.0, 0.2, 0.5]), "sigmas: wanted falling values"),
        (lambda: ODE().transitions([981, 500, 1]), r"sigmas: ODE wanted flow sigmas within \[0, 1\], got 981"),
        (lambda: ODE().transitions([1.0, float("nan"), 0.0]), "sigmas: wanted finite"),
        (
            lambda: FlowSDE().transitions([1.0, 0.5], full=[0.9, 0.5, 0.0]),
            "full: wanted the schedule that sigmas is a part of",
        ),
        (lambda: DDIM(ALPHAS).transitions(SIGMAS), "sigmas: DDIM wanted integers below 1000"),
        (lambda: DDIM(ALPHAS).transitions([1000, 0]), "sigmas: DDIM wanted integers below 1000"),
        (lambda: DDIM(ALPHAS).transitions([500, 500, 0]), "sigmas: DDIM wanted falling timesteps"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_one_step_schedules() -> None:
    for dynamics in (ODE(), ODE("dpmpp", 2), CPS(0.7), DPMSolverSDE(), FlowDDIM(0.7), DanceSDE(0.3)):
        tr = dynamics.transitions([1.0, 0.0])
        assert len(tr) == 1 and float(tr.p[0]) == 1.0
