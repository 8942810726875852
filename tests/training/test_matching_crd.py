"""Centered Reward Distillation: what follows from its formula, which test_matching.py holds against float64."""

from __future__ import annotations

import pytest
import torch

import fastflow as ff
from tests.tolerance import LOSS
from tests.training.test_matching import CRD, data, ours


def test_the_moving_reference_itself_has_no_implicit_reward(backend: str) -> None:
    """Bit for bit, so that the gap is the reward's alone; a group of one or of equal rewards then adds nothing."""
    d = data((4, 112))
    d["old_velocity"] = d["velocity"]
    d["advantage"] = torch.tensor([1.0, -2.0, 0.5, 0.5])
    loss, gradient, info = ours(d, "crd", None, backend, group_ids=[0, 0, 1, 1])
    assert bool((info["implicit"] == 0.0).all())
    assert float(loss) == pytest.approx(5.0 * 2 * 0.15**2 / 4, rel=LOSS)  # rewards 0.6 and 0.3
    assert bool((gradient[:2] != 0.0).any(1).all()) and not bool(gradient[2:].any())
    assert not bool(ours(d, "crd", None, backend, group_ids=[0, 1, 2, 3])[1].any())


def test_crd_does_not_depend_on_the_names_or_order_of_groups(backend: str) -> None:
    d = data((6, 16, 20, 10))
    wanted = ours(d, "crd", None, backend, group_ids=torch.tensor([0, 1, 0, 2, 1, 0]))
    named = ours(d, "crd", None, backend, group_ids=[-5, 9, -5, 4, 9, -5])
    assert torch.equal(wanted[0], named[0]) and torch.equal(wanted[1], named[1])
    apart = ours(d, "crd", None, backend, group_ids=[0, 0, 0, 1, 1, 1])
    assert not torch.equal(wanted[1], apart[1])


def test_a_descent_on_crd_ranks_implicit_rewards_as_the_rewards(backend: str) -> None:
    d = data((4, 112))
    d["old_velocity"], d["advantage"] = d["velocity"].clone(), torch.tensor([2.0, -1.0, -3.0, 4.0])
    first = float(ours(d, "crd", None, backend, group_ids=[0] * 4)[0])
    for _ in range(50):
        loss, gradient, info = ours(d, "crd", None, backend, group_ids=[0] * 4)
        d["velocity"] = d["velocity"] - 2.0 * gradient
    assert float(loss) < first
    assert info["implicit"].argsort().tolist() == d["advantage"].argsort().tolist()


def test_adaptive_kl_weight() -> None:
    advantage = torch.tensor([-9.0, -5.0, 0.0, 5.0, 7.0])
    wanted = torch.tensor([1e-4, 1e-4, (1e-4 + 0.1) / 2, 0.1, 0.1])
    assert ff.adaptive_kl_weight(advantage).tolist() == pytest.approx(wanted.tolist(), rel=LOSS)
    assert ff.adaptive_kl_weight(torch.tensor([1.0]), 2.0, least=1.0, advantage_max=2.0).tolist() == [1.75]
    with pytest.raises(ValueError, match="advantage_max: wanted a number above 0, got 0.0"):
        ff.adaptive_kl_weight(advantage, advantage_max=0.0)


def test_group_ids_are_integers() -> None:
    with pytest.raises(TypeError, match="group_ids: wanted int64, got torch.float32"):
        ff.matching_loss(
            torch.zeros(3, 8),
            torch.zeros(3, 8),
            torch.ones(3),
            ff.Noise([1, 2, 3]),
            **{**CRD, "group_ids": torch.zeros(3)},
        )


def test_the_reference_is_guided_and_wider_than_the_velocity(backend: str) -> None:
    """A KL to CFG's float32 velocity beside a network's bfloat16."""
    d = data((4, 112), torch.bfloat16)
    guidance, uncond = ff.CFG(4.5), d["old_velocity"]
    wide = guidance.combine(d["ref_velocity"], uncond)
    plain = uncond.double() + 4.5 * (d["ref_velocity"].double() - uncond.double())
    rows = ff.matching_rows(d["velocity"], d["clean"], d["noise"], ref_velocity=wide, backend=backend)
    wanted = (d["velocity"].double() - plain).square().mean(1)
    assert rows.shift.tolist() == pytest.approx(wanted.tolist(), rel=LOSS)


def test_no_rows(backend: str) -> None:
    empty, one = torch.zeros(0, 8), torch.zeros(0)
    loss, info = ff.matching_loss(
        empty, empty, one, ff.Noise([]), objective="crd", advantage=one, old_velocity=empty, ref_velocity=empty,
        group_ids=[], kl_weight=one, backend=backend,
    )  # fmt: skip
    assert float(loss) == float(info["kl"]) == 0.0 and info["implicit"].shape == (0,)
