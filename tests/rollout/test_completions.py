"""Completions of dynamics that are not the usual flow with one knob."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.rollout import plain
from tests.rollout.compare import T, compare, dense_rollout, expected
from tests.rollout.networks import seeds_of

KNOBS = [0.25 + 0.03 * i for i in range(T)]


def per_step(family: Any) -> plain.Rule:
    def rule(sigmas: Sequence[float], i: int) -> plain.Move:
        return family(KNOBS[i])(sigmas, i)

    return rule


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    ("dynamics", "rule"),
    [
        (ff.TableSDE(tuple(KNOBS)), plain.table_sde(KNOBS)),
        (ff.CPS(tuple(KNOBS)), per_step(plain.cps)),
        (ff.FlowSDE(tuple(KNOBS)), per_step(plain.flow_sde)),
        (ff.DanceSDE(tuple(KNOBS)), per_step(plain.dance_sde)),
    ],
    ids=["table", "cps", "flow", "dance"],
)
def test_a_knob_per_step_leaves_respaced_completions_alone(
    sd3: Any, condition: Any, dynamics: Any, rule: plain.Rule, n: int
) -> None:
    dense = ff.Completion(n)
    traj = dense_rollout(sd3, dynamics, seeds_of(1), condition=condition, dense=dense)
    compare(traj, expected(sd3, traj, condition, rule=rule, dense=dense))


@pytest.fixture
def diffusion(sd3: Any) -> Any:
    """A network that predicts epsilon at integer timesteps."""

    def epsilon(sample: Tensor, time: Tensor, condition: Any) -> Tensor:
        return sd3(sample, time / 1000.0, condition)

    return epsilon


ALPHAS = (1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
TIMES = [float(t) for t in range(901, 0, -180)] + [0.0]


def clean_of(time: float) -> tuple[float, float]:
    alpha = float(ALPHAS[int(time)])
    return 1.0 / alpha**0.5, -((1.0 - alpha) ** 0.5) / alpha**0.5


@pytest.mark.parametrize("n", ["all", 1])
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_ddim(diffusion: Any, condition: Any, n: Any, eta: float) -> None:
    """n = 1 is the clean prediction from every state, the last one too, whose grid ends above the clean sample."""
    dense = ff.Completion(n)
    traj = dense_rollout(
        diffusion, ff.DDIM(ALPHAS, eta=eta), seeds_of(1), sigmas=TIMES, condition=condition, dense=dense
    )
    rule, finish = plain.ddim(ALPHAS.tolist(), eta), plain.ddim(ALPHAS.tolist(), 0.0)
    rows = expected(diffusion, traj, condition, rule=rule, finish=finish, sigmas=TIMES, clean_of=clean_of, dense=dense)
    compare(traj, rows)


def test_one_evaluation_is_the_clean_prediction_on_a_schedule_that_ends_above_zero(sd3: Any, condition: Any) -> None:
    sigmas, dense = [1.0, 0.7, 0.3, 0.1], ff.Completion(1)
    traj = dense_rollout(sd3, ff.DanceSDE(0.3), seeds_of(1), sigmas=sigmas, condition=condition, dense=dense)
    compare(traj, expected(sd3, traj, condition, rule=plain.dance_sde(0.3), sigmas=sigmas, dense=dense))
