"""On-policy replay: a trainer that repeats the main calls gets the rollout's log_probs back, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from tests.rollout.networks import SHAPE, Recorder, conditions, rows_of, transformer
from tests.tolerance import REPLAY_FULL

SIGMAS = ff.sigma_schedule(10, shift=3.0)
NEGATIVE = conditions(1, seed=1)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def network(request: pytest.FixtureRequest) -> ff.models.SD3:
    return ff.models.SD3(transformer(2).to(request.param))


def rollout(network: Any, batch: int, **changes: Any) -> ff.Trajectory:
    arguments = {"guidance": ff.CFG(3.5), "negative": NEGATIVE, "dense": ff.Completion(), "progress": False, **changes}
    prompt_index = torch.arange(batch) % 3
    dynamics = arguments.pop("dynamics", ff.FlowSDE(0.7))
    return ff.rollout(
        network,
        SHAPE,
        SIGMAS,
        dynamics,
        torch.arange(batch),
        condition=conditions(),
        prompt_index=prompt_index,
        **arguments,
    )


def replayed(
    network: Any, traj: ff.Trajectory, k: int, guidance: ff.CFG | None = None, negative: Any = NEGATIVE
) -> Tensor:
    """What a trainer computes for step k of a (part of a) trajectory."""
    guidance = guidance if guidance is not None else ff.CFG(3.5)
    t, index = traj.transition(k), traj.prompt_index
    condition, negative = rows_of(conditions(), index), rows_of(negative, index)
    velocity, uncond = ff.evaluate(network, t.sample, t.sigma, condition, negative, guidance)
    return ff.log_prob(t.sample, velocity, t.next_sample, t.at, uncond=uncond, guidance=guidance)


@pytest.mark.parametrize("batch", [2, 3, 6, 16])
def test_ratio_is_one_for_every_row_and_step(network: Any, batch: int) -> None:
    traj = rollout(network, batch)
    for k in range(10):
        log_prob = replayed(network, traj, k)
        assert torch.equal(log_prob, traj.log_probs[:, k]), f"step {k}"
        assert ((log_prob - traj.log_probs[:, k]).exp() == 1.0).all()


def test_ratio_is_one_in_the_trainers_own_micro_batches(network: Any) -> None:
    """main_rows is the trainer's width; completions and max_rows change nothing."""
    traj = rollout(network, 6, main_rows=2, max_rows=10)
    assert traj.stats.widths == (4,)
    for part in traj.split(2):
        for k in range(10):
            assert torch.equal(replayed(network, part, k), part.log_probs[:, k]), f"step {k}"


def test_ratio_is_one_with_two_guidance_calls_of_different_length(network: Any) -> None:
    negative, guidance = conditions(1, 3, seed=2), ff.CFG(3.5, calls=2)
    traj = rollout(network, 3, negative=negative, guidance=guidance)
    for k in range(10):
        assert torch.equal(replayed(network, traj, k, guidance, negative), traj.log_probs[:, k]), f"step {k}"


@pytest.mark.parametrize("rescale", ["token", "clamp"])
def test_ratio_is_one_with_a_rescale(network: Any, rescale: str) -> None:
    guidance = ff.CFG(3.5, rescale=rescale, axis=1)
    traj = rollout(network, 3, guidance=guidance)
    for k in range(10):
        assert torch.equal(replayed(network, traj, k, guidance), traj.log_probs[:, k]), f"step {k}"


@pytest.mark.parametrize("dynamics", [ff.CPS(0.7), ff.DanceSDE(0.3)], ids=["cps", "dance"])
def test_ratio_is_one_for_other_dynamics_and_a_window(network: Any, dynamics: Any) -> None:
    traj = rollout(network, 3, dynamics=dynamics, steps=[2, 3, 7])
    for k in range(3):
        assert torch.equal(replayed(network, traj, k), traj.log_probs[:, k]), f"step {k}"


def test_ratio_is_one_with_narrow_states(network: Any) -> None:
    """The stored value is the scored value."""
    traj = rollout(network, 3, dynamics=ff.CPS(0.7), steps=[0, 1, 2], state_dtype=torch.bfloat16)
    assert traj.samples.dtype == torch.bfloat16
    for k in range(3):
        assert torch.equal(replayed(network, traj, k), traj.log_probs[:, k]), f"step {k}"


def test_ratio_is_one_after_select_save_and_cat(network: Any, tmp_path: Any) -> None:
    parts = [rollout(network, 6, main_rows=3)[i] for i in ([4, 1, 2], slice(3, 6))]
    ff.Trajectory.cat(parts).save(tmp_path / "t.safetensors")
    for part, before in zip(ff.Trajectory.load(tmp_path / "t.safetensors").split(3), parts, strict=True):
        for k in range(10):
            assert torch.equal(part.log_probs[:, k], before.log_probs[:, k])
    ordered = ff.Trajectory.load(tmp_path / "t.safetensors")[3:]
    for k in range(10):
        assert torch.equal(replayed(network, ordered, k), ordered.log_probs[:, k]), f"step {k}"


class Touchy:
    """A network whose answer shows the width of the call and the place of the row in it, far above rounding."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        place = torch.arange(len(sample)) + 10.0 * len(sample)
        return self.network(sample, sigma, condition).float() + 1e-3 * place[:, None, None, None]


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize(
    "limits", [{}, {"main_rows": 2}, {"main_rows": 3, "max_rows": 10}, {"widths": (12, 24)}], ids=str
)
def test_replay_at_main_width_and_order_is_the_rollouts_own_call(
    network: Any, calls: int, limits: dict[str, Any]
) -> None:
    guidance, touchy = ff.CFG(3.5, calls=calls), Touchy(network)
    if calls == 2 and "widths" in limits:
        limits = {"widths": (6, 24)}
    traj = rollout(touchy, 6, guidance=guidance, **limits)
    for part in traj.split(limits.get("main_rows", 6)):
        for k in range(10):
            assert torch.equal(replayed(touchy, part, k, guidance), part.log_probs[:, k]), f"step {k}"


def test_lockstep_full_promises_no_replay(network: Any) -> None:
    """Its calls grow wider step by step; log_probs are as close as the network is, so a trainer rescores."""
    seen = Recorder(network)
    traj = rollout(seen, 1, lockstep="full")
    assert seen.rows == [2 * (i + 1) for i in range(10)]
    for k in range(10):
        difference = (replayed(network, traj, k) - traj.log_probs[:, k]).abs().max()
        assert difference <= REPLAY_FULL[network.dtype], f"step {k}: {difference:.3g}"
    touchy = Touchy(network)
    traj = rollout(touchy, 1, lockstep="full")
    equal = [torch.equal(replayed(touchy, traj, k), traj.log_probs[:, k]) for k in range(10)]
    assert equal == [True] + [False] * 9


def test_gradients_flow_through_the_same_call(network: Any) -> None:
    """evaluate is the training forward too: under grad it gives the same bits and a gradient in the weights."""
    traj = rollout(network, 2)
    weight = network.module.proj_out.weight.requires_grad_(True)
    try:
        log_prob = replayed(network, traj, 3)
        assert torch.equal(log_prob.detach(), traj.log_probs[:, 3])
        (gradient,) = torch.autograd.grad((log_prob - traj.log_probs[:, 3]).exp().sum(), weight)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    finally:
        weight.requires_grad_(False)


def test_a_rollout_keeps_no_graph_and_leaves_modes_alone(network: Any) -> None:
    weight = network.module.proj_out.weight.requires_grad_(True)
    try:
        traj = rollout(network, 2)
        assert not traj.samples.requires_grad and not traj.log_probs.requires_grad
        assert torch.is_grad_enabled()
        with torch.inference_mode():
            inside = rollout(network, 2)
        assert not inside.samples.is_inference()
        assert torch.equal(inside.samples, traj.samples)
    finally:
        weight.requires_grad_(False)
