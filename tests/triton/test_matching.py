"""The six means of a matching loss and their gradient have the bits of backends/matching.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastflow as ff
from fastflow.backends import matching as plain
from fastflow.backends import triton
from fastflow.backends.base import StepCall
from tests.triton.calls import DEVICE, copy, make_call

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BETA = 0.6  # 1 - beta has other bits in float32 than in float64
NUMELS = (40, 2049, 4100)
SOURCES = ("seeds", "noise", "given")


def made(numel: int, source: str = "seeds", names: tuple[str, ...] = ("old", "ref"), **options: Any) -> StepCall:
    """A call in which `given` is the target; "old" and "ref": the other networks' velocities that are there."""
    call = make_call(options.pop("batch", 2), numel, source=source, rows=1, **options)
    make = torch.Generator().manual_seed(8)

    def near() -> Tensor:
        return (call.velocity.float() + 0.3 * torch.randn(call.velocity.shape, generator=make)).to(call.velocity.dtype)

    return replace(call, old_mean=near() if "old" in names else None, ref_velocity=near() if "ref" in names else None)


def results(call: StepCall) -> list[tuple[Tensor, Tensor]]:
    """(means, gradient) by Triton and by plain torch, on the CPU."""
    grad, found = torch.randn(3, call.batch, generator=torch.Generator().manual_seed(1)), []
    for module, device in ((triton, DEVICE), (plain, "cpu")):
        there = copy(call, device)
        means, gradient = torch.full((6, call.batch), 7.0, device=device), torch.full_like(there.velocity, 7.0)
        assert module is plain or triton.refuse(there) is None
        module.matching(there, BETA, means)
        module.matching_backward(there, grad.to(device), gradient)
        found.append((means.cpu(), gradient.cpu()))
    return found


def check(call: StepCall) -> Tensor:
    """Both compared to the bit; the means."""
    (means, gradient), (wanted, wanted_gradient) = results(call)
    assert wanted.isfinite().all() and wanted_gradient.isfinite().all()
    assert torch.equal(means, wanted)
    assert torch.equal(gradient, wanted_gradient)
    return means


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("numel", NUMELS)
def test_rows_of_any_length(numel: int, source: str, masked: bool) -> None:
    assert bool((check(made(numel, source, masked=masked)) > 0.0).all(1)[[0, 1, 3, 4, 5]].all())


@pytest.mark.parametrize("masked", [False, True])
def test_several_tiles_in_a_program(masked: bool) -> None:
    check(made(4100, masked=masked, batch=3))


@pytest.mark.parametrize("names", [(), ("old",), ("ref",)])
def test_absent_networks(names: tuple[str, ...]) -> None:
    means = check(made(600, names=names))
    assert bool(means[1].any()) == bool(means[2].any()) == ("old" in names) and bool(means[5].any()) == ("ref" in names)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("narrow", [BF16, F16])
def test_narrow_dtypes(narrow: torch.dtype, source: str) -> None:
    check(made(600, source, sample=narrow, velocity=narrow, kept=narrow))
    check(made(600, source, velocity=narrow))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("numel", [40, 2049])
def test_rows_without_elements(numel: int) -> None:
    call = made(numel, masked=True, batch=3)
    call.mask[1] = False
    (means, gradient), (wanted, wanted_gradient) = results(call)
    assert torch.equal(means, wanted) and not means[:, 1].any()
    assert torch.equal(gradient, wanted_gradient) and not gradient[1].any()


def test_no_rows_and_no_elements() -> None:
    for shape in ((0, 300), (2, 0)):
        call, means = (
            copy(made(shape[1], "given", batch=shape[0]), DEVICE),
            torch.full((6, shape[0]), 7.0, device=DEVICE),
        )
        triton.matching(call, BETA, means)
        triton.matching_backward(call, means[:3], torch.empty_like(call.velocity))
        assert not means.any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("numel", [40, 4100])
def test_a_row_does_not_depend_on_the_others(numel: int) -> None:
    call = made(numel, masked=True, batch=3)
    names = ("sample", "velocity", "old_mean", "ref_velocity", "seeds", "mask")
    whole = results(call)[0][0]
    part = replace(call, batch=1, **{name: getattr(call, name)[1:2] for name in names})
    assert torch.equal(results(part)[0][0], whole[:, 1:2])


def test_a_dtype_that_is_not_served() -> None:
    call = copy(made(40), DEVICE)
    reason = triton.refuse(replace(call, old_mean=call.old_mean.double()))
    assert reason == "old_mean has dtype torch.float64: wanted float32, bfloat16 or float16"


def loss(backend: str, objective: str, noise: str, masked: bool) -> tuple[Tensor, Tensor]:
    """What `ff.matching_loss` gives, and its gradient in a bfloat16 velocity, on the CPU."""
    make, device = torch.Generator().manual_seed(3), DEVICE if backend == "triton" else "cpu"

    def draw(dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(2, 4, 525, generator=make).to(device, dtype)

    clean, v, explicit, old, ref = draw(F32), draw(), draw(F32), draw(), draw()
    mask = (torch.rand(clean.shape, generator=make) < 0.7).to(device) if masked else None
    sources = {
        "seeds": {"noise": ff.Noise(torch.tensor([5, 6], device=device), step=4, stream=9)},
        "noise": {"noise": explicit},
        "target": {"target": explicit},
    }
    value, _ = ff.matching_loss(
        v.requires_grad_(), clean, torch.tensor([0.3, 0.8], device=device), **sources[noise], objective=objective,
        advantage=torch.tensor([1.3, -0.7], device=device), old_velocity=old, ref_velocity=ref, beta=BETA, kl_weight=0.1,
        mask=mask, backend=backend,
    )  # fmt: skip
    value.backward()
    return value.detach().cpu(), v.grad.cpu()


@pytest.mark.parametrize(
    ("objective", "noise", "masked"),
    [
        ("nft", "seeds", False),
        ("nft", "noise", True),
        ("awm", "seeds", True),
        ("mse", "target", False),
        ("dpo", "seeds", False),
    ],
)
def test_the_matching_loss_has_the_bits_of_the_reference(objective: str, noise: str, masked: bool) -> None:
    found, wanted = (loss(backend, objective, noise, masked) for backend in ("triton", "reference"))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert wanted[0].isfinite() and bool(wanted[1].any())
