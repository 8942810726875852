"""The gradient of log_prob has the bits of the reference's closed form (which gradcheck holds)."""

from __future__ import annotations

import pytest
import torch

from fastflow.backends.base import StepCall
from tests.triton.calls import gradients, make_call, still
from tests.triton.test_step import RESCALES

BF16, F32 = torch.bfloat16, torch.float32


def compare(call: StepCall, in_uncond: bool = True) -> None:
    shape = (call.batch, call.numel) if call.reduce == 2 else (call.batch,)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (velocity, uncond), (wanted, wanted_uncond) = gradients(call, grad, in_uncond)
    assert torch.equal(velocity, wanted)
    assert (uncond is None) == (wanted_uncond is None)
    if uncond is not None:
        assert torch.equal(uncond, wanted_uncond)


@pytest.mark.parametrize("reduce", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", RESCALES)
def test_guidance(form: str, masked: bool, reduce: int) -> None:
    compare(make_call(numel=600, source="given", guided=True, masked=masked, reduce=reduce, **RESCALES[form]))


@pytest.mark.parametrize("score", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_scores(score: int, masked: bool) -> None:
    call = make_call(3, source="given", score=score, masked=masked)
    still(call.coef, 1)
    if masked:
        call.mask[2] = False
    compare(call)


@pytest.mark.parametrize("velocity", [BF16, torch.float16])
@pytest.mark.parametrize("form", ["none", "channels first", "clamp"])
def test_gradients_are_stored_in_the_dtype_of_velocity(form: str, velocity: torch.dtype) -> None:
    compare(
        make_call(numel=600, source="given", kept=BF16, sample=BF16, velocity=velocity, guided=True, **RESCALES[form])
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", [{}, {"guided": True, "rescale": "clamp"}])
def test_rows_of_several_programs(form: dict[str, object]) -> None:
    compare(make_call(numel=5000, source="given", masked=True, **form))


def test_no_gradient_in_uncond() -> None:
    compare(make_call(numel=600, source="given", guided=True, **RESCALES["channels last"]), in_uncond=False)
    compare(make_call(numel=600, source="given", guided=True), in_uncond=False)


def test_a_velocity_that_is_not_rescaled() -> None:
    call = make_call(numel=600, source="given", guided=True, **RESCALES["channels last"])
    call.velocity[0] = call.uncond[0] = 0.0
    compare(call)
    call = make_call(numel=600, source="given", guided=True, **RESCALES["clamp"])
    call.scale.fill_(0.3)  # shrinks, so that clamp leaves it alone
    compare(call)


def test_one_gradient_expanded_over_the_rows() -> None:
    call = make_call(3, source="given")
    (velocity, _), (wanted, _) = gradients(call, torch.ones(()).expand(3))
    assert torch.equal(velocity, wanted)
