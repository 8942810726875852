"""Rows that vectors can be loaded from, rows that they cannot, and layouts between: the bits are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastflow.backends import triton, triton_launch
from tests.triton.calls import DEVICE, SLOTS, assert_same, check, copy, expected, gradients, make_call

N = 4096
FORMS = {
    "plain": {},
    "guided": {"guided": True},
    "channels first": {"guided": True, "rescale": "token", "token": (1, 16, 256)},
    "channels last": {"guided": True, "rescale": "token", "token": (64, 64, 1)},
    "channels between": {"guided": True, "rescale": "token", "token": (4, 32, 32)},
    "inner axis of 4": {"guided": True, "rescale": "token", "token": (64, 16, 4)},
    "clamp": {"guided": True, "rescale": "clamp"},
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request: pytest.FixtureRequest) -> Any:
    return request.param


def alignment(t: torch.Tensor) -> int:
    return triton_launch.alignment(t.shape[1], [t])


def test_what_vectors_need() -> None:
    make = torch.zeros
    assert alignment(make(2, N)) == alignment(make(3, N + 16)[:, :N]) == triton_launch.ALIGNED
    assert alignment(make(1, N + 1)[:, :N]) == triton_launch.ALIGNED  # one row: no stride
    assert alignment(make(2, N + 8)) == alignment(make(2, N + 8)[:, :N]) == alignment(make(2, 2 * N)[:, 1 : N + 1]) == 1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduce", [0, 2])
def test_forward(form: Any, reduce: int) -> None:
    check(make_call(numel=N, source="given", reduce=reduce, masked=True, **form))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduce", [0, 2])
def test_backward(form: Any, reduce: int) -> None:
    call = make_call(numel=N, source="given", reduce=reduce, masked=True, **form)
    grad = torch.randn((2, N) if reduce == 2 else (2,))
    (velocity, uncond), (wanted, wanted_uncond) = gradients(call, grad)
    assert torch.equal(velocity, wanted)
    assert uncond is None or torch.equal(uncond, wanted_uncond)


@pytest.mark.parametrize("gap", [16, 3])
def test_rows_of_a_trajectory(gap: int) -> None:
    call = make_call(3, N, guided=True, masked=True)
    wanted, actual = expected(call), copy(call, DEVICE)
    whole = {
        name: torch.zeros(3, 4, t.shape[1] + gap).to(t) for name in SLOTS if (t := getattr(actual, name)).dim() == 2
    }
    for name, buffer in whole.items():
        setattr(actual, name, buffer[:, 2, :N])
    triton.step(actual)
    assert_same(actual, wanted)
    for buffer in whole.values():
        assert not buffer[:, [0, 1, 3]].any() and not buffer[:, 2, N:].any()


def test_a_row_that_begins_between_vectors() -> None:
    call = make_call(2, N)
    wanted, actual = expected(call), copy(call, DEVICE)
    actual.sample = torch.zeros(2, N + 16).to(actual.sample)[:, 1 : N + 1].copy_(actual.sample)
    triton.step(actual)
    assert_same(actual, wanted)
