"""`ff.parity`: it sees a difference, and names what made it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastflow as ff
from tests.rollout import networks
from tests.rollout.networks import conditions
from tests.training.test_replay import model_of, roll

pytest.importorskip("diffusers", reason="needs diffusers: its networks are compared")


def cause(traj: ff.Trajectory, model: Any, given: dict[str, Any], **options: Any) -> str:
    found = ff.parity(traj, model, **given, **options)
    assert not found.exact and found.cause in str(found)
    return found.cause


def test_the_same_network_is_equal_bit_for_bit() -> None:
    model = model_of(torch.bfloat16)
    traj, given = roll(model)
    found = ff.parity(traj, model, **given)
    assert found.exact and found.ok and found.cause == "equal bit for bit"
    assert found.difference == [0.0] * 6 and found.ratio == [(1.0, 1.0)] * 6 and found.past == [0.0] * 6
    assert (found.rows, found.width, found.schedule_hash) == (6, 6, traj.transitions.hash)
    assert "equal bit for bit" in str(found) and traj.transitions.hash in str(found)


def test_numbers_by_step() -> None:
    model = model_of()
    traj, given = roll(model)
    shift = torch.tensor([0.0, 1e-6, -3e-4, 0.0, 2e-4, 0.0])
    traj = replace(traj, log_probs=traj.log_probs - shift * torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 0.0])[:, None])
    found = ff.parity(traj, model, **given, clip=1e-4)
    assert found.difference == pytest.approx([0.0, 1e-6, 3e-4, 0.0, 2e-4, 0.0], abs=3e-7)
    assert found.past == pytest.approx([0.0, 0.0, 4 / 6, 0.0, 4 / 6, 0.0])
    assert found.ratio[2] == pytest.approx((0.9997, 1.0), abs=1e-6) and not found.ok


def test_timestep_cast() -> None:
    model = ff.models.SD3(networks.transformer().to(torch.bfloat16), timestep_cast="network")
    traj, given = roll(model)
    text = cause(traj, ff.models.SD3(model.module), given)
    assert "likely cause: timestep cast: 'float32' here, 'network' in the rollout" in text
    assert "and 0 with that mended" in text


def test_call_width() -> None:
    inner = model_of()

    def model(sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        """A network whose kernels depend on the number of rows, as those of large ones do."""
        return inner(sample, sigma, condition) * (1.0 + 1e-4 * len(sample))

    traj, given = roll(model, 16)
    assert "likely cause: call width: 1 samples a call here, 16 in the rollout" in cause(traj, model, given, rows=1)


def test_guidance_in_the_networks_dtype() -> None:
    model = model_of(torch.bfloat16)
    traj, given = roll(model, guidance=ff.CFG(3.0, dtype="velocity"))
    text = cause(traj, model, {**given, "guidance": ff.CFG(3.0)})
    assert "guidance is combined in float32 here, in the network's dtype in the rollout" in text


class ConditionalFirst:
    """Another engine, which puts the conditional half of a call first, and whose network notices."""

    def __init__(self, model: Any, first: bool) -> None:
        self.model, self.first = model, first

    def __call__(self, sample: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        half = len(sample) // 2
        order = torch.arange(2 * half).roll(half) if self.first else torch.arange(2 * half)
        velocity = self.model(sample[order], sigma[order], {name: t[order] for name, t in condition.items()})
        uneven = velocity * torch.linspace(0.9, 1.1, 2 * half)[:, None, None, None]
        return uneven[order]


def test_order_of_the_halves() -> None:
    model = model_of()
    traj, given = roll(ConditionalFirst(model, True), negative=conditions(3, seed=1))
    text = cause(traj, ConditionalFirst(model, False), given)
    assert "order of the halves: the rollout had the conditional rows first" in text


class Compiled(nn.Module):
    """Stands where torch.compile's wrapper stands: the same weights, other arithmetic."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, **arguments: Any) -> Any:
        (velocity,) = self._orig_mod(**arguments)
        return (velocity * 1.001,)


def test_compiled_against_eager() -> None:
    model = model_of()
    traj, given = roll(model)
    text = cause(traj, ff.models.SD3(Compiled(model.module)), given)
    assert "the network is compiled here and was not in the rollout" in text


def test_rounding_of_stored_states() -> None:
    model = model_of()
    traj, given = roll(model, dense=None)
    narrow = replace(traj, samples=traj.samples.bfloat16())
    assert "rounding of the stored states to bfloat16, after they were scored" in cause(narrow, model, given, clip=1.0)


def test_other_weights_have_no_such_cause() -> None:
    model = model_of()
    traj, given = roll(model)
    other = copy.deepcopy(model.module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    text = cause(traj, ff.models.SD3(other), given)
    assert "cause unknown" in text and "the weights, the conditioning or the guidance may not be the rollout's" in text


def test_what_is_not_finite_is_not_fine() -> None:
    model = model_of(torch.float32)
    traj, given = roll(model)
    calls = iter(range(100))

    def broken(sample: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        velocity = model(sample, sigma, condition)
        return velocity * float("nan") if next(calls) == 1 else velocity

    found = ff.parity(traj, broken, **given)
    assert not found.ok and not found.exact and "not finite" in found.cause
    with pytest.raises(ValueError, match="clip: wanted a number of at least 0, got nan"):
        ff.parity(traj, model, **given, clip=float("nan"))


def test_messages() -> None:
    model = model_of()
    traj, given = roll(model, dynamics=ff.ODE(), dense=None)
    with pytest.raises(
        ValueError, match="trajectory: wanted stored transitions of at least one sample, got Trajectory"
    ):
        ff.parity(traj, model, **given)
