"""The families against numbers that were computed apart from this code, and against each other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflow.dynamics import CPS, ODE, DanceSDE, DPMSolverSDE, Dynamics, FlowDDIM, FlowSDE, TableSDE, WanSDE
from fastflow.dynamics.schedule import Sigmas
from tests.tolerance import FLOAT32, FLOAT64

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "vectors.json").read_text())
INPUTS, ROWS = VECTORS["inputs"], VECTORS["rows"]
FAMILIES: dict[str, Dynamics] = {
    "flow_sde_0_7": FlowSDE(0.7),
    "dance_sde_0_3": DanceSDE(0.3),
    "wan_sde": WanSDE(),
    "cps_0_7": CPS(0.7),
    "flow_ddim_0_7": FlowDDIM(0.7),
    "dpmpp_1_sde": DPMSolverSDE(),
    "euler": ODE(),
}
SCHEDULE = [1.0, INPUTS["sigma_1"], INPUTS["sigma"], INPUTS["sigma_next"], INPUTS["sigma_last"]]


def falling(count: int = 6) -> st.SearchStrategy[list[float]]:
    """Strictly falling sigmas, sometimes from 1 and to 0."""
    inner = st.lists(st.integers(1, 9999), min_size=2, max_size=count, unique=True)
    ends = st.tuples(st.booleans(), st.booleans())
    return st.builds(
        lambda mid, end: [1.0] * end[0] + [i / 10000 for i in sorted(mid, reverse=True)] + [0.0] * end[1], inner, ends
    )


@pytest.mark.parametrize(
    ("name", "step", "row"), [*((n, 2, n) for n in FAMILIES), ("flow_sde_0_7", 0, "flow_sde_0_7_first_step")]
)
def test_published_rules(name: str, step: int, row: str) -> None:
    tr, wanted = FAMILIES[name].transitions(SCHEDULE), ROWS[row]
    a, b, std = (float(column[step]) for column in (tr.a, tr.b, tr.std))
    for got, key in ((a, "a"), (b, "b"), (std, "std")):
        assert got == pytest.approx(wanted[key], rel=FLOAT64, abs=FLOAT64), key
    mean = a * INPUTS["sample"] + b * INPUTS["velocity"]
    assert mean == pytest.approx(wanted["mean"], rel=FLOAT64)
    assert mean + std * INPUTS["noise"] == pytest.approx(wanted["next_sample"], rel=FLOAT64)
    if tr.score == "square":
        log_prob = -((std * INPUTS["noise"]) ** 2)
    else:
        table = tr.table(torch.float64)[step]
        log_prob = float(table[9] - table[10] * (std * INPUTS["noise"]) ** 2)
    if std > 0:
        assert log_prob == pytest.approx(wanted["log_prob"], rel=FLOAT64)
    else:
        assert wanted["log_prob"] is None and log_prob == 0.0


@given(falling())
def test_every_rule_without_noise_is_euler_bit_for_bit(values: list[float]) -> None:
    sigmas = torch.tensor(values, dtype=torch.float64)
    for dynamics in (
        ODE(),
        ODE("dpmpp"),
        FlowSDE(0.0),
        DanceSDE(0.0),
        CPS(0.0),
        FlowDDIM(0.0),
        TableSDE([0.0] * (len(values) - 1)),
    ):
        tr = dynamics.transitions(sigmas)
        assert torch.equal(tr.a, torch.ones_like(tr.a)) and torch.equal(tr.b, sigmas[1:] - sigmas[:-1])
        assert torch.equal(tr.std, torch.zeros_like(tr.std))


@given(falling())
def test_flow_clean_and_ode_rows(values: list[float]) -> None:
    sigmas = torch.tensor(values, dtype=torch.float64)
    for dynamics in (DanceSDE(0.3), CPS(0.8), FlowDDIM(1.0), DPMSolverSDE(), ODE("dpmpp", 2)):
        tr = dynamics.transitions(sigmas)
        assert torch.equal(tr.p, torch.ones_like(tr.p)) and torch.equal(tr.q, -sigmas[:-1])
        assert torch.equal(tr.ode_a, torch.ones_like(tr.p)) and torch.equal(tr.ode_b, sigmas[1:] - sigmas[:-1])
        assert torch.equal(tr.sigma, sigmas[:-1]) and torch.equal(tr.sigma_next, sigmas[1:])
        assert torch.equal(tr.timestep, sigmas[:-1] * 1000)


@given(falling(), st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]))
def test_unrounded_formulas_agree_without_noise(values: list[float], level: float) -> None:
    """The formulas themselves, before noiseless rows are replaced: DDIM(0), CPS(0) and DPM++ are Euler by algebra."""
    for dynamics in (CPS(0.0), FlowDDIM(0.0), DanceSDE(0.0)):
        grid = dynamics.grid(values)
        rows = dynamics.rows(grid)
        assert torch.allclose(rows.a, torch.ones_like(rows.a), rtol=FLOAT64, atol=FLOAT64)
        assert torch.allclose(rows.b, grid.sigma_next - grid.sigma, rtol=FLOAT64, atol=FLOAT64)
    # For a point mass at 0 the state is sigma eps and v = eps = x / sigma: renoising rules keep its variance exactly.
    for dynamics in (CPS(level), FlowDDIM(level), DPMSolverSDE()):
        tr = dynamics.transitions(values)
        variance = (tr.a * tr.sigma + tr.b) ** 2 + tr.std**2
        assert torch.allclose(variance, tr.sigma_next**2, rtol=FLOAT64, atol=FLOAT64)


@given(falling(), st.floats(0.01, 1.0))
def test_dance_score_form_is_the_reverse_sde(values: list[float], eta: float) -> None:
    """DanceGRPO's own words: x + dt v - (eta^2 / 2) score dt, score = -(x - (1 - sigma) clean) / sigma^2."""
    tr = DanceSDE(eta).transitions(values)
    sigma, dt = tr.sigma, tr.sigma_next - tr.sigma
    for x, v in ((1.0, 0.0), (0.0, 1.0), (0.5, -1.2)):
        score = -(x - (1.0 - sigma) * (x - sigma * v)) / sigma**2
        wanted = x + dt * v - 0.5 * eta**2 * score * dt
        assert torch.allclose(tr.a * x + tr.b * v, wanted, rtol=FLOAT64, atol=FLOAT64)
    assert torch.allclose(tr.std, eta * (-dt).sqrt(), rtol=FLOAT64)


@given(falling())
def test_ddim_with_eta_one_is_the_dpm_sde(values: list[float]) -> None:
    one, other = FlowDDIM(1.0).transitions(values), DPMSolverSDE().transitions(values)
    assert torch.allclose(
        one.table(torch.float64)[:, :3], other.table(torch.float64)[:, :3], rtol=FLOAT64, atol=FLOAT64
    )


def test_ends_are_closed_forms() -> None:
    sigmas = Sigmas([1.0, 0.6, 0.0])
    cps, ddim, dpm = (d.transitions(sigmas) for d in (CPS(1.0), FlowDDIM(1.0), DPMSolverSDE()))
    for tr in (cps, ddim, dpm):  # from sigma = 1 all noise is fresh; into sigma' = 0 the clean prediction comes back
        assert torch.allclose(tr.std, torch.tensor([0.6, 0.0], dtype=torch.float64), rtol=FLOAT64)
        assert float(tr.a[0]) == pytest.approx(0.4, rel=FLOAT64) and float(tr.b[0]) == pytest.approx(-0.4, rel=FLOAT64)
        assert float(tr.a[1]) == 1.0 and float(tr.b[1]) == -0.6
        assert float(tr.table()[1, 9]) == 0.0 and float(tr.table()[1, 10]) == 0.0
    assert float(FlowSDE(0.7).transitions(sigmas).std[1]) > 0.1  # Flow-GRPO's last step keeps its noise


def test_sigma_near_one_counts_as_one() -> None:
    values = [1.0, 0.96, 0.85, 0.5, 0.0]
    exact = FlowSDE(0.7).transitions(values)
    assert float(exact.std[0]) == pytest.approx(0.7, rel=FLOAT64)
    near = FlowSDE(0.7).transitions([1.0 - 6e-8, *values[1:]])  # a float32 schedule's start
    assert float(near.std[0]) == pytest.approx(0.7, rel=FLOAT32)
    above = FlowSDE(0.7).transitions([1.0 + 1e-7, *values[1:]])
    assert float(above.std[0]) == pytest.approx(0.7, rel=FLOAT32)
    # A part of a schedule is guarded by the full schedule's second sigma: s = 0.7 sqrt(1 / 0.04).
    part = FlowSDE(0.7).transitions([1.0, 0.9, 0.85], full=values)
    assert float(part.std[0]) == pytest.approx(0.7 * math.sqrt(0.1 / 0.04), rel=FLOAT64)
