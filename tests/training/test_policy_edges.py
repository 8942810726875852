"""`ff.policy_loss` with guidance in the network's dtype, with std 0, with values that are not finite, and without elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastflow as ff
from tests.tolerance import LOSS
from tests.training.test_policy import SIGMAS, TABLE, data

NARROW = ff.CFG(3.0, dtype="velocity")
FIXED = ("sample", "velocity", "next_sample", "at", "old_log_prob", "advantage")
BACKENDS = ("reference", "cpu")


def loss(d: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return ff.policy_loss(*(d[name] for name in FIXED), **options)


@pytest.mark.parametrize("uncond_grad", [False, True])
def test_uncond_gets_a_gradient_only_where_asked_in_the_networks_dtype(backend: str, uncond_grad: bool) -> None:
    d = data((4, 112), torch.bfloat16)
    d["velocity"], d["uncond"] = d["velocity"].requires_grad_(), d["uncond"].requires_grad_()
    options = {"uncond": d["uncond"], "guidance": NARROW, "uncond_grad": uncond_grad, "backend": backend}
    value, _ = loss(d, **options)
    score = ff.log_prob(d["sample"], d["velocity"], d["next_sample"], d["at"], **options)
    for result in (value, score.sum()):
        d["velocity"].grad = d["uncond"].grad = None
        result.backward()
        assert bool(d["velocity"].grad.any())
        assert (d["uncond"].grad is not None and bool(d["uncond"].grad.any())) == uncond_grad


def test_a_divergence_under_guidance_in_the_networks_dtype(backend: str) -> None:
    d = data((4, 112), torch.bfloat16)
    both = {"ref_velocity": d["ref_velocity"], "ref_uncond": d["ref_uncond"], "kl": "velocity", "kl_weight": 0.3}
    _, info = loss(d, uncond=d["uncond"], guidance=NARROW, backend=backend, **both)
    shift = NARROW.combine(d["velocity"], d["uncond"]).double() - NARROW.combine(d["ref_velocity"], d["ref_uncond"])
    torch.testing.assert_close(info["kl_row"].double(), shift.square().mean(1), rtol=LOSS, atol=LOSS)


def test_both_velocities_of_the_reference_have_one_dtype() -> None:
    d = data((4, 112))
    with pytest.raises(
        TypeError, match="ref_uncond: wanted the dtype of ref_velocity, torch.float32, got torch.bfloat16"
    ):
        loss(
            d, uncond=d["uncond"], guidance=ff.CFG(2.0), ref_velocity=d["ref_velocity"], kl="velocity",
            ref_uncond=d["ref_uncond"].bfloat16(),
        )  # fmt: skip


def test_tempflows_weight_of_a_step_that_the_host_knows(backend: str) -> None:
    d = data((4, 112)) | {"at": TABLE.at(3)}
    weight = ff.noise_aware_weight(d["at"])
    assert weight.dim() == 0
    one, _ = loss(d, row_weight=weight, backend=backend)
    each, _ = loss(d, row_weight=weight.expand(4), backend=backend)
    none, _ = loss(d, backend=backend)
    assert torch.equal(one, each) and not torch.equal(one, none)


@pytest.mark.parametrize("objective", ["ppo", "guard", "guard_ratio", "dppo"])
@pytest.mark.parametrize("kl", ["gaussian", "flow_grpo", "velocity"])
def test_no_gaussian_term_where_std_is_0_under_the_square_score(backend: str, objective: str, kl: str) -> None:
    """CPS's last step ends without noise, and its square score counts all the same."""
    transitions = ff.CPS(0.7).transitions(SIGMAS)
    last = len(transitions) - 1
    assert float(transitions.std[last]) == 0.0
    d = data((4, 112)) | {"at": transitions.at(torch.tensor([2, last, 3, last]))}
    d["velocity"] = d["velocity"].requires_grad_()
    options = {"kl": kl, "kl_weight": 1.0, "ref_velocity": d["ref_velocity"], "objective": objective}
    drift = {} if objective == "ppo" else {"old_mean": d["old_mean"]}
    value, info = loss(d, backend=backend, **options, **drift)
    expected = kl == "velocity"
    assert [bool(row) for row in info["kl_row"] != 0] == [True, expected, True, expected]
    assert float(info["rows"]) == 4.0
    (far,) = torch.autograd.grad(value, d["velocity"])
    near = {**drift, **({"old_mean": d["old_mean"] + 3.0} if drift else {})}
    _, moved = loss(d, backend=backend, **options, **near)
    assert torch.equal(info["ratio"][1::2], moved["ratio"][1::2]) and bool(far.isfinite().all())


@pytest.mark.parametrize("objective", ["ppo", "dppo"])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("old", [float("nan"), -800.0, 800.0])
def test_what_is_not_finite_is_told_alike(backend: str, old: float, advantage: float, objective: str) -> None:
    d = data((4, 112))
    d["old_log_prob"][1], d["advantage"][1] = old, advantage
    options = {"objective": objective, "old_mean": d["old_mean"] if objective == "dppo" else None}
    (value, info), (wanted, told) = (loss(d, backend=name, **options) for name in (backend, "reference"))
    torch.testing.assert_close(value, wanted, equal_nan=True, rtol=LOSS, atol=LOSS)
    for name in ("ratio_max", "ratio_min", "ratio_mean", "clip_fraction"):
        torch.testing.assert_close(info[name], told[name], equal_nan=True, rtol=LOSS, atol=LOSS)
    assert bool(told["ratio_max"].isnan()) == (old != old)


@pytest.mark.parametrize("shape", [(3, 0), (3, 2, 0)])
def test_rows_without_elements(backend: str, shape: tuple[int, ...]) -> None:
    none = torch.zeros(shape)
    velocity = none.clone().requires_grad_()
    at, row = TABLE.at(1), torch.zeros(3)
    value, info = ff.policy_loss(none, velocity, none, at, row, row + 1.0, backend=backend)
    value.backward()
    assert float(value.detach()) == -1.0 and torch.equal(info["log_prob"], row) and velocity.grad.shape == shape
    out = ff.step(none, none, at, noise=none, want=("log_prob", "next_sample"), backend=backend)
    assert torch.equal(out.log_prob, row) and out.next_sample.shape == shape
    matched, _ = ff.matching_loss(
        velocity, none, row + 0.5, none, old_velocity=none, objective="awm", advantage=row + 1.0
    )
    assert float(matched.detach()) == -1.0


@pytest.mark.parametrize("objective", ["ppo", "guard"])
def test_one_gradient_is_all_that_is_allocated_of_the_samples_size(objective: str) -> None:
    """Forward and backward on backend cpu: whatever the row length, the rest is the same handful of bytes."""
    pytest.importorskip("fastflow._cpu", reason="needs the compiled module")
    rest = []
    for length in (2048, 20480):
        d = data((4, length), torch.bfloat16)
        d["velocity"] = d["velocity"].requires_grad_()
        reference = {name: d[name] for name in ("ref_velocity", "ref_uncond", "old_mean")}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            value, _ = loss(
                d, uncond=d["uncond"], guidance=ff.CFG(3.0), kl="gaussian", kl_weight=0.1, objective=objective, backend="cpu",
                **reference,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(value, d["velocity"])
        taken = sum(max(event.self_cpu_memory_usage, 0) for event in found.events())
        rest.append(taken - gradient.numel() * gradient.element_size())
    assert rest[0] == rest[1] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_weight": -1.0}, "kl_weight: wanted a number of at least 0, got -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight: wanted a number of at least 0, got nan"),
        ({"kl_weight": torch.ones(4)}, "kl_weight: wanted a number of at least 0, got tensor"),
        ({"clip": ("a", "b")}, "clip: wanted"),
        ({"clip": 0.1}, "clip: wanted"),
        ({"divergence": "a"}, "divergence: wanted at least 0, got a"),
    ],
)
def test_numbers_that_are_none(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loss(data((4, 112)), **changes)
