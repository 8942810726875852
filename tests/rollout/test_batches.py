"""A sample does not depend on its neighbours: the split of the batch, their number, their order, the call limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.rollout.networks import PROMPTS, SHAPE, RowWise, conditions

SIGMAS = ff.sigma_schedule(6, shift=3.0)
SEEDS = ff.sample_seeds(3, 1, [10, 20, 30], 2)
INDEX = torch.arange(PROMPTS).repeat_interleave(2)
DYNAMICS = {
    "flow": ff.FlowSDE(0.7),
    "cps": ff.CPS(0.7),
    "ode": ff.ODE(),
    "dpmpp": ff.ODE("dpmpp", 2),
}


def roll(rows: Any = slice(None), shape: tuple[int, ...] = SHAPE, **changes: Any) -> ff.Trajectory:
    arguments: dict[str, Any] = {
        "dynamics": ff.FlowSDE(0.7), "dense": ff.Completion(), "guidance": ff.CFG(2.0), "negative": conditions(1, seed=1),
        **changes,
    }  # fmt: skip
    return ff.rollout(
        RowWise(), shape, SIGMAS, arguments.pop("dynamics"), SEEDS[rows], condition=conditions(),
        prompt_index=INDEX[rows], reward=mean_reward, progress=False, **arguments,
    )  # fmt: skip


def mean_reward(images: Tensor, info: ff.Info) -> Tensor:
    return torch.stack([image.double().mean() for image in images])


def assert_same(actual: ff.Trajectory, wanted: ff.Trajectory) -> None:
    actual_parts, wanted_parts = actual.as_dict(), wanted.as_dict()
    assert actual_parts.keys() == wanted_parts.keys()
    for name, value in wanted_parts.items():
        assert torch.equal(actual_parts[name], value), name


@pytest.mark.parametrize("dynamics", DYNAMICS.values(), ids=DYNAMICS)
@pytest.mark.parametrize("lockstep", ["exact", "full"])
@pytest.mark.parametrize("shape", [SHAPE, (4, 5, 3), (4, 1, 1)], ids=str)
def test_six_rows_are_two_rollouts_of_three(dynamics: Any, lockstep: str, shape: tuple[int, ...]) -> None:
    """Odd shapes leave tails in every vector loop."""
    dense = ff.Completion(solver="dpmpp", order=2) if dynamics == ff.ODE("dpmpp", 2) else ff.Completion()
    common = {"dynamics": dynamics, "lockstep": lockstep, "shape": shape, "dense": dense}
    joined = ff.Trajectory.cat([roll(slice(0, 3), **common), roll(slice(3, 6), **common)])
    assert_same(roll(**common), joined)


@pytest.mark.parametrize("n", ["all", 1, 3])
def test_limits_change_no_bit(n: Any) -> None:
    wanted = roll(dense=ff.Completion(n))
    for limits in (
        {"lockstep": "full"}, {"max_rows": 6}, {"main_rows": 4}, {"max_rows": 10, "lockstep": "full"},
        {"widths": (4, 8)}, {"guidance": ff.CFG(2.0, calls=2)}, {"max_decode": 4},
    ):  # fmt: skip
        assert_same(roll(dense=ff.Completion(n), **limits), wanted)


def test_twice_the_same_seeds_give_the_same_bits() -> None:
    assert_same(roll(), roll())


def test_seeds_key_the_noise_and_position_does_not() -> None:
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    assert_same(roll(order), roll()[order])
    other = ff.rollout(
        RowWise(), SHAPE, SIGMAS, ff.FlowSDE(0.7), SEEDS + 1, condition=conditions(), prompt_index=INDEX, progress=False
    )
    here = roll(guidance=None, negative=None, dense=None)
    assert not (other.samples[:, 0] == here.samples[:, 0]).any(-1).any()


def test_the_random_state_of_torch_is_neither_used_nor_changed() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = roll()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same(roll(), first)


def test_initial_noise_is_not_that_of_the_first_step() -> None:
    """Same seed and counter, another stream."""
    first = ff.Noise(SEEDS, step=0).sample(SHAPE)
    start = roll().samples[:, 0]
    assert not torch.equal(first, start)
    assert (first * start).mean().abs() < 0.1


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_backends_give_the_same_bits(backend: str) -> None:
    assert_same(roll(backend=backend), roll(backend="reference"))


def test_an_empty_batch_is_a_whole_trajectory_of_no_rows() -> None:
    traj = roll(slice(0, 0))
    assert traj.samples.shape == (0, 7, *SHAPE) and traj.positions == tuple(range(7))
    assert traj.log_probs.shape == (0, 6) and traj.steps == tuple(range(6))
    assert traj.clean is not None and traj.clean.shape == (0, 7, *SHAPE)
    assert traj.stats.calls == 0
    assert_same(
        ff.Trajectory.cat([roll(slice(0, 3)), roll(slice(0, 0)).set_rewards(torch.zeros(0, 7))]), roll(slice(0, 3))
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_of_another_dtype(dtype: torch.dtype) -> None:
    """float64 stays close to float32; the network gets the state in the state's dtype."""
    seen = set()

    def network(sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        seen.add((sample.dtype, sigma.dtype))
        return RowWise()(sample.float(), sigma, condition)

    arguments = {
        "condition": conditions(),
        "prompt_index": INDEX,
        "dense": ff.Completion(),
        "progress": False,
        "steps": [0, 1],
    }
    traj = ff.rollout(network, SHAPE, SIGMAS, ff.CPS(0.7), SEEDS, state_dtype=dtype, **arguments)
    assert seen == {(dtype, torch.float32)}
    assert {traj.samples.dtype, traj.clean.dtype, traj.final.dtype} == {dtype}  # type: ignore[union-attr]
    single = ff.rollout(network, SHAPE, SIGMAS, ff.CPS(0.7), SEEDS, **arguments)
    spacing = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    assert (traj.final.double() - single.final.double()).abs().max() <= 64 * spacing * single.final.abs().max()  # type: ignore[union-attr]
