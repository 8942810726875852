"""`CFG.combine`: the guided velocity of `ff.step`, by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff

GUIDANCE = {
    "plain": ff.CFG(4.5),
    "by row": ff.CFG(torch.tensor([1.0, 4.5, 0.5])),
    "token": ff.CFG(3.0, rescale="token", axis=1),
    "clamp": ff.CFG(3.0, rescale="clamp"),
    "network's dtype": ff.CFG(4.5, dtype="velocity"),
}


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randn(3, 6, 5, 4, generator=generator).to(dtype) for _ in range(2))
    return first, second


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_a_step_forms_inside(backend: str, guidance: ff.CFG, dtype: torch.dtype) -> None:
    velocity, uncond = pair(dtype)
    guided = guidance.combine(velocity, uncond)
    assert guided.dtype == (dtype if guidance.dtype == "velocity" else torch.float32)
    at = ff.ODE().transitions([1.0, 0.6, 0.0]).at(0)
    zero = torch.zeros(velocity.shape)
    fused = ff.step(zero, velocity, at, uncond=uncond, guidance=guidance, want=("ode_next",), backend=backend)
    apart = ff.step(zero, guided, at, want=("ode_next",), backend=backend)
    assert fused.ode_next is not None and apart.ode_next is not None
    assert torch.equal(fused.ode_next, apart.ode_next)


def test_the_formula_and_its_gradient() -> None:
    velocity, uncond = pair(torch.float64)
    assert torch.equal(ff.CFG(4.5).combine(velocity, uncond), uncond + 4.5 * (velocity - uncond))
    inputs = tuple(t[:, :2, :2, :1].clone().requires_grad_(True) for t in (velocity, uncond))
    for guidance in (ff.CFG(4.5), ff.CFG(3.0, rescale="token", axis=1)):
        assert torch.autograd.gradcheck(guidance.combine, inputs)


@pytest.mark.parametrize(
    ("arguments", "scale", "error", "message"),
    [
        ((torch.zeros(3, 8), None), 2.0, ValueError, "uncond: wanted the unconditional velocity beside guidance"),
        ((None, torch.zeros(3, 8)), 2.0, TypeError, "velocity: wanted a tensor, got NoneType"),
        ((torch.zeros(3, 8), torch.zeros(3, 7)), 2.0, ValueError, r"uncond: wanted the shape of sample \(3, 8\)"),
        ((torch.zeros(3, 8), torch.zeros(3, 8).half()), 2.0, TypeError, "uncond: wanted the dtype of velocity"),
        (
            (torch.zeros(3, 8), torch.zeros(3, 8)), [1.0, 2.0], ValueError,
            r"guidance.scale: wanted one number or one per row \[3\], got 2",
        ),
    ],
)  # fmt: skip
def test_messages(arguments: tuple[Any, Any], scale: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ff.CFG(scale).combine(*arguments)
