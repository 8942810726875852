"""`ff.log_prob`: the same bits as the rollout, and the closed-form gradient."""

from __future__ import annotations

import pytest
import torch

import fastflow as ff
from tests.ops.cases import GUIDANCE, SD3, formulas, inputs
from tests.tolerance import assert_gradient, log_prob_bound

SCORES = ("gaussian", "gaussian_no_const", "square")
STEPS = torch.tensor([0, 4, 9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guidance", [None, *GUIDANCE])
@pytest.mark.parametrize("dynamics", [ff.FlowSDE(0.7), ff.DanceSDE(0.3), ff.CPS(0.7)], ids=lambda d: type(d).__name__)
def test_replay_is_the_rollout_bit_for_bit(
    backend: str, dynamics: object, guidance: str | None, dtype: torch.dtype
) -> None:
    data = inputs((3, 4, 30, 20), dtype, torch.bfloat16)
    guided = {"uncond": data["uncond"], "guidance": GUIDANCE[guidance]} if guidance else {}
    at = dynamics.transitions(SD3).at(STEPS)  # type: ignore[attr-defined]
    for extra in ({}, {"mask": data["mask"]}, {"reduce": "sum"}, {"reduce": "none"}):
        out = ff.step(
            data["sample"], data["velocity"], at, noise=ff.Noise([5, 6, 7], step=1), backend=backend, **guided, **extra
        )
        replay = ff.log_prob(data["sample"], data["velocity"], out.next_sample, at, backend=backend, **guided, **extra)
        assert torch.equal(replay, out.log_prob), extra
        again = ff.step(
            data["sample"], data["velocity"], at, next_sample=out.next_sample, backend=backend, **guided, **extra
        )
        assert torch.equal(again.log_prob, out.log_prob)
        assert torch.isfinite(replay).all()


def test_the_stored_value_is_the_scored_value(backend: str) -> None:
    data = inputs((3, 400), torch.bfloat16)
    at = ff.FlowSDE(0.7).transitions(SD3).at(3)
    kwargs = {"noise": data["noise"], "backend": backend}
    scored = ff.step(data["sample"], data["velocity"], at, **kwargs)
    unrounded = ff.step(data["sample"], data["velocity"], at, score_rounded=False, **kwargs)
    assert torch.equal(scored.next_sample, unrounded.next_sample)
    assert not torch.equal(scored.log_prob, unrounded.log_prob)
    exact = formulas(data, at, torch.float64)["log_prob"]  # scores the value before rounding
    assert ((unrounded.log_prob - exact).abs() < log_prob_bound(400)).all()
    wide = {"next_sample": torch.empty(3, 400), "log_prob": torch.empty(3)}
    stored = ff.step(data["sample"], data["velocity"], at, out=wide, **kwargs)
    assert torch.equal(stored.log_prob, unrounded.log_prob)  # a float32 slot rounds nothing


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("reduce", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_reductions_and_mask(backend: str, score: str, reduce: str, masked: bool) -> None:
    data = inputs((3, 7, 11))
    at = ff.FlowSDE(0.7).transitions(SD3).at(STEPS)
    mask = data["mask"] if masked else None
    out = ff.step(
        data["sample"],
        data["velocity"],
        at,
        noise=data["noise"],
        score=score,
        reduce=reduce,
        mask=mask,
        backend=backend,
    )
    exact = formulas(data, at, torch.float64, next_sample=out.next_sample, score=score, reduce=reduce, masked=masked)[
        "log_prob"
    ]
    bound = log_prob_bound(77 if reduce != "none" else 1) * (77 if reduce == "sum" else 1)
    assert ((out.log_prob - exact).abs() <= bound * (1 + exact.abs())).all()


def test_mask_corners(backend: str) -> None:
    data = inputs((3, 40))
    at = ff.FlowSDE(0.7).transitions(SD3).at(3)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1] = False
    mask[2, 20:] = False
    out = ff.step(data["sample"], data["velocity"], at, noise=data["noise"], mask=mask, backend=backend)
    plain = ff.step(data["sample"], data["velocity"], at, noise=data["noise"], backend=backend)
    assert torch.equal(out.next_sample, plain.next_sample)  # masked elements are stepped
    assert out.log_prob[0] == plain.log_prob[0] and out.log_prob[1] == 0
    short = ff.step(
        data["sample"][2:, :20], data["velocity"][2:, :20], at, noise=data["noise"][2:, :20], backend=backend
    )
    assert out.log_prob[2] == short.log_prob[0]  # a padded sequence scores as its unpadded self, bit for bit


def test_std_zero_scores_and_gradients(backend: str) -> None:
    data = inputs((2, 50))
    at = ff.ODE().transitions(SD3).at(4)
    velocity = data["velocity"].requires_grad_()
    for score in SCORES:
        value = ff.log_prob(data["sample"], velocity, data["noise"], at, score=score, backend=backend)
        (gradient,) = torch.autograd.grad(value.sum(), velocity)
        if score == "square":
            exact = formulas(data, at, torch.float64, next_sample=data["noise"], score="square")["log_prob"]
            assert ((value - exact).abs() <= log_prob_bound(50) * (1 + exact.abs())).all() and gradient.abs().max() > 0
        else:
            assert torch.equal(value, torch.zeros(2)) and torch.equal(gradient, torch.zeros(2, 50))


@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guidance", [None, *GUIDANCE])
@pytest.mark.parametrize("reduce", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_that_of_float64_autograd(
    backend: str, guidance: str | None, velocity: torch.dtype, reduce: str, masked: bool
) -> None:
    data = inputs((3, 8, 5, 6), velocity=velocity)
    cfg = GUIDANCE[guidance] if guidance else None
    at = ff.FlowSDE(0.7).transitions(SD3).at(torch.tensor([1, 4, 8]))
    stored = ff.step(
        data["sample"], data["velocity"], at, noise=data["noise"], backend="reference",
        uncond=data["uncond"] if cfg else None, guidance=cfg,
    ).next_sample  # fmt: skip
    weights = torch.randn(3) if reduce != "none" else torch.randn(3, 8, 5, 6)

    exact_inputs = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    exact_inputs["velocity"].requires_grad_()
    exact_inputs["uncond"].requires_grad_()
    exact = formulas(exact_inputs, at, torch.float64, guidance=cfg, next_sample=stored, reduce=reduce, masked=masked)
    (exact["log_prob"] * weights).sum().backward()

    v, u = data["velocity"].requires_grad_(), data["uncond"].requires_grad_()
    value = ff.log_prob(
        data["sample"], v, stored, at, uncond=u if cfg else None, guidance=cfg, uncond_grad=cfg is not None, reduce=reduce,
        mask=data["mask"] if masked else None, backend=backend,
    )  # fmt: skip
    (value * weights).sum().backward()
    assert v.grad is not None and v.grad.dtype == velocity
    assert_gradient(v.grad, exact_inputs["velocity"].grad, "velocity")
    if cfg:
        assert u.grad is not None and u.grad.dtype == velocity
        assert_gradient(u.grad, exact_inputs["uncond"].grad, "uncond")
    else:
        assert u.grad is None


def test_uncond_gets_a_gradient_only_where_asked(backend: str) -> None:
    data = inputs((2, 60))
    at = ff.FlowSDE(0.7).transitions(SD3).at(3)
    v, u = data["velocity"].requires_grad_(), data["uncond"].requires_grad_()
    ff.log_prob(data["sample"], v, data["noise"], at, uncond=u, guidance=ff.CFG(3.0), backend=backend).sum().backward()
    assert u.grad is None and v.grad is not None


def test_backward_saves_its_inputs_alone(backend: str) -> None:
    """No float32 temporary is kept for the gradient: what autograd saves is storage that the caller already holds."""
    data = inputs((2, 4096), velocity=torch.bfloat16)
    at = ff.FlowSDE(0.7).transitions(SD3).at(3)
    v = data["velocity"].requires_grad_()
    held = {t.untyped_storage().data_ptr() for t in (data["sample"], v, data["noise"], data["uncond"], data["mask"])}
    extra: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in held:
            extra.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ff.log_prob(
            data["sample"], v, data["noise"], at, uncond=data["uncond"], guidance=ff.CFG(3.0), mask=data["mask"],
            backend=backend,
        )  # fmt: skip
    assert sum(extra) <= 16 * len(data["sample"]) + 1  # rows of coefficients and the scale
