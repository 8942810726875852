"""Trajectories: what stands where, selecting, joining, moving."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.rollout.networks import SHAPE, RowWise, conditions, seeds_of

SIGMAS = ff.sigma_schedule(6, shift=3.0)


def make(**changes: Any) -> ff.Trajectory:
    arguments: dict[str, Any] = {"dense": ff.Completion(), "reward": named_reward, "progress": False, **changes}
    return ff.rollout(
        RowWise(), SHAPE, arguments.pop("sigmas", SIGMAS), arguments.pop("dynamics", ff.FlowSDE(0.7)),
        arguments.pop("seeds", seeds_of(2)), condition=conditions(), **arguments,
    )  # fmt: skip


def named_reward(images: Tensor, info: ff.Info) -> dict[str, Tensor]:
    return {"mean": images.flatten(1).mean(1), "brightness/top": images.flatten(1).amax(1)}


def plain_reward(images: Tensor, info: ff.Info) -> Tensor:
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def traj() -> ff.Trajectory:
    return make()


def test_it_prints_as_one_line(traj: ff.Trajectory) -> None:
    text = repr(traj)
    assert "\n" not in text and "7 states, 6 transitions, 7 completed states, final, clean, rewards, gains" in text
    bare = dataclasses.replace(traj, final=None, clean=None, rewards=None, gains=None)
    assert "7 completed states, partial" in repr(bare)


def assert_same(actual: ff.Trajectory, wanted: ff.Trajectory) -> None:
    """Every field, bit for bit."""
    mine, theirs = actual.as_dict(), wanted.as_dict()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype and torch.equal(mine[name], value), name
    for name in ("positions", "steps", "states", "transitions"):
        assert getattr(actual, name) == getattr(wanted, name), name
    assert torch.equal(actual.sigmas, wanted.sigmas) and torch.equal(actual.sigmas.timesteps, wanted.sigmas.timesteps)


def test_shapes(traj: ff.Trajectory) -> None:
    assert len(traj) == traj.batch == 6
    assert traj.samples.shape == (6, 7, *SHAPE) and traj.positions == tuple(range(7))
    assert traj.log_probs.shape == (6, 6) and traj.log_probs.dtype == torch.float32 and traj.steps == tuple(range(6))
    assert traj.clean is not None and traj.clean.shape == (6, 7, *SHAPE) and traj.states == tuple(range(7))
    assert traj.final is not None and torch.equal(traj.final, traj.samples[:, -1])
    assert torch.equal(traj.clean[:, -1], traj.final)
    assert isinstance(traj.rewards, dict) and isinstance(traj.gains, dict)
    for name, values in traj.rewards.items():
        assert values.shape == (6, 7)
        assert torch.equal(traj.gains[name], values[:, 1:] - values[:, :-1])
    assert torch.equal(traj.rewards["mean"], traj.clean.flatten(2).mean(2))


@pytest.mark.parametrize("n", ["all", 2])
def test_the_table_of_the_trajectory_is_the_dynamics_own(n: Any) -> None:
    """Whatever completions ran: a trainer can compare it, and its hash, with the one that it builds."""
    own = ff.FlowSDE(0.7).transitions(SIGMAS)
    traj = make(dense=ff.Completion(n))
    assert traj.transitions == own and traj.stats.schedule_hash == own.hash


def test_a_transition_is_what_was_stepped(traj: ff.Trajectory) -> None:
    for k in range(6):
        t = traj.transition(k)
        assert torch.equal(t.sample, traj.samples[:, k]) and torch.equal(t.next_sample, traj.samples[:, k + 1])
        assert float(t.at.sigma) == float(SIGMAS[k]) and float(t.at.sigma_next) == float(SIGMAS[k + 1])
        assert t.timestep.dtype == torch.float32 and torch.equal(t.timestep, (1000 * SIGMAS[k]).float().expand(6))
        assert t.sigma.shape == (6,) and t.sigma.dtype == torch.float32
        velocity = RowWise()(
            t.sample, t.sigma, {"pooled_projections": conditions()["pooled_projections"][traj.prompt_index]}
        )
        assert torch.equal(ff.log_prob(t.sample, velocity, t.next_sample, t.at), traj.log_probs[:, k])
    for k in (6, -7):
        with pytest.raises(IndexError, match="k: wanted a stored transition, 0 to 5"):
            traj.transition(k)


def test_a_transition_of_a_window_is_that_of_its_step() -> None:
    traj = make(steps=[4, 1])
    assert (traj.positions, traj.steps) == ((1, 2, 4, 5), (1, 4))
    t = traj.transition(1)
    assert float(t.at.sigma) == float(SIGMAS[4])
    assert torch.equal(t.sample, traj.samples[:, 2]) and torch.equal(t.next_sample, traj.samples[:, 3])


def test_timesteps_are_those_of_the_schedule() -> None:
    sigmas = ff.Sigmas([1.0, 0.6, 0.2, 0.0], timesteps=[999.0, 600.5, 201.0])
    traj = make(sigmas=sigmas, dynamics=ff.DanceSDE(0.3))
    assert [float(traj.transition(k).timestep[0]) for k in range(3)] == [999.0, 600.5, 201.0]
    assert traj.as_dict()["timesteps"].tolist() == [[999.0, 600.5, 201.0]] * 6


INDICES: dict[str, tuple[Any, list[int]]] = {
    "int": (2, [2]),
    "last": (-1, [5]),
    "numpy int": (np.int64(2), [2]),
    "0-dim tensor": (torch.tensor(2), [2]),
    "slice": (slice(1, 5, 2), [1, 3]),
    "list": ([4, 0, 0], [4, 0, 0]),
    "negative list": ([-1, -6], [5, 0]),
    "tensor": (torch.tensor([3, 1]), [3, 1]),
    "numpy": (np.array([3, 1]), [3, 1]),
    "range": (range(2, 4), [2, 3]),
    "bool tensor": (torch.tensor([True, False, False, True, False, False]), [0, 3]),
    "bool list": ([True, False, False, True, False, False], [0, 3]),
    "empty list": ([], []),
    "no row": (torch.zeros(6, dtype=torch.bool), []),
}


@pytest.mark.parametrize(("index", "rows"), INDICES.values(), ids=INDICES)
def test_indexing_keeps_a_batch_axis(traj: ff.Trajectory, index: Any, rows: list[int]) -> None:
    chosen = traj[index]
    assert len(chosen) == len(rows)
    for name, value in traj.as_dict().items():
        assert torch.equal(chosen.as_dict()[name], value[rows]), name


@pytest.mark.parametrize("index", [6, -7, [0, 6], torch.tensor([7])], ids=str)
def test_indexing_outside(traj: ff.Trajectory, index: Any) -> None:
    with pytest.raises(IndexError, match="index: wanted -6 to 5, got"):
        traj[index]


@pytest.mark.parametrize("index", [[True], [0.5], [[0, 1]], torch.ones(5, dtype=torch.bool), True], ids=str)
def test_indexing_with_another_thing(traj: ff.Trajectory, index: Any) -> None:
    with pytest.raises(TypeError, match=r"index: wanted an int, a slice, indices or a bool mask \[6\], got"):
        traj[index]


def test_iteration_ends(traj: ff.Trajectory) -> None:
    assert [len(part) for part in traj] == [1] * 6  # type: ignore[attr-defined]


def test_split_and_cat_are_inverse(traj: ff.Trajectory) -> None:
    parts = traj.split(4)
    assert [len(p) for p in parts] == [4, 2]
    joined = ff.Trajectory.cat(parts)
    assert_same(joined, traj)
    assert joined.stats == traj.stats, "the parts of one rollout cost what it cost"
    with pytest.raises(ValueError, match="size: wanted at least 1, got 0"):
        traj.split(0)


def test_cat_adds_the_costs_of_different_rollouts(traj: ff.Trajectory) -> None:
    other = make(main_rows=2, max_decode=3, decode=lambda clean, info: clean)
    joined = ff.Trajectory.cat([traj, other])
    assert joined.stats.calls == traj.stats.calls + other.stats.calls
    assert joined.stats.evaluations == 2 * traj.stats.evaluations and joined.stats.decodes == other.stats.decodes == 42
    assert joined.stats.widths == (2, 6)
    assert joined.stats.seconds["network"] == traj.stats.seconds["network"] + other.stats.seconds["network"]


def test_cat_refuses_what_does_not_fit(traj: ff.Trajectory) -> None:
    window = {"steps": [0, 1]}
    cases: list[tuple[ff.Trajectory, str]] = [
        (make(steps=[1, 2]), r"parts\[1\].positions: wanted \(0, 1, 2, 3, 4, 5, 6\), as in the first, got \(1, 2, 3\)"),
        (make(dense=None), r"parts\[1\].states: wanted .* got \(6,\)"),
        (make(dynamics=ff.FlowSDE(0.6)), r"parts\[1\].transitions: wanted Transitions\(FlowSDE\(noise_level=0.7\)"),
        (make(state_dtype=torch.float64), r"parts\[1\].samples: wanted torch.float32 .*, got torch.float64"),
        (
            make(reward=plain_reward),
            r"parts\[1\].rewards: wanted 'brightness/top' .*'mean' .*, got torch.float32 \[B, 7\]",
        ),
        (make(reward=None), r"parts\[1\].rewards: wanted .*, got None"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message):
            ff.Trajectory.cat([traj, other])
    with pytest.raises(ValueError, match="parts: wanted at least one trajectory, got none"):
        ff.Trajectory.cat([])
    both = [make(dynamics=ff.CPS(0.7), state_dtype=d, **window) for d in (torch.float32, torch.bfloat16)]
    with pytest.raises(ValueError, match=r"got torch.bfloat16"):
        ff.Trajectory.cat(both)


def test_as_dict_has_the_batch_first_everywhere(traj: ff.Trajectory) -> None:
    fields = traj.as_dict()
    assert set(fields) == {
        "samples", "log_probs", "final", "clean", "rewards/mean", "rewards/brightness/top", "gains/mean",
        "gains/brightness/top", "seeds", "prompt_index", "timesteps", "sigmas", "steps", "positions", "states",
    }  # fmt: skip
    assert all(isinstance(value, Tensor) and value.shape[0] == 6 for value in fields.values())
    assert torch.equal(fields["sigmas"], SIGMAS[:-1].float().expand(6, -1))
    order = torch.randperm(6)
    shuffled = {name: value[order] for name, value in fields.items()}
    assert torch.equal(shuffled["log_probs"], traj[order].log_probs)


def test_as_dict_leaves_out_what_there_is_not() -> None:
    fields = make(reward=None).as_dict()
    assert not any(name.startswith(("rewards", "gains")) for name in fields)
    assert set(make(reward=plain_reward).as_dict()) >= {"rewards", "gains"}


def test_set_rewards(traj: ff.Trajectory) -> None:
    values = torch.randn(6, 7)
    changed = traj.set_rewards(values)
    assert torch.equal(changed.rewards, values) and torch.equal(changed.gains, values.diff(dim=1))  # type: ignore[arg-type]
    assert isinstance(traj.rewards, dict), "the trajectory itself does not change"
    named = traj.set_rewards({"a": values, "b": -values})
    assert isinstance(named.gains, dict) and torch.equal(named.gains["b"], -values.diff(dim=1))
    with pytest.raises(ValueError, match=r"rewards: wanted \[6, 7\], got \(6, 6\)"):
        traj.set_rewards(values[:, 1:])
    with pytest.raises(ValueError, match=r"rewards\['a'\]: wanted \[6, 7\], got \(7,\)"):
        traj.set_rewards({"a": values[0]})


def test_to_moves_every_tensor_and_casts_none(traj: ff.Trajectory) -> None:
    moved = traj.to("meta")
    assert {value.device.type for name, value in moved.as_dict().items()} == {"meta"}
    assert moved.samples.dtype == torch.float32
    assert_same(traj.to("cpu"), traj)


def test_pickle(traj: ff.Trajectory) -> None:
    assert_same(pickle.loads(pickle.dumps(traj)), traj)
