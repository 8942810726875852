"""The rows of a policy loss, in one launch, have the bits of backends/policy_rows.py."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastflow.backends import policy_rows as plain
from fastflow.backends import triton, triton_losses
from fastflow.backends.base import PolicyCall
from fastflow.dynamics.columns import COLUMNS, SIGMA, SIGMA_NEXT, STD
from tests.triton.calls import DEVICE

CLIP = 1e-4


def made(batch: int = 5, objective: int = plain.PPO, kl: int = plain.KL_NONE, **changes: Any) -> PolicyCall:
    """Ratios on both sides of a narrow clip range; every third row adds no noise."""
    make = torch.Generator().manual_seed(batch)

    def draw() -> Tensor:
        return torch.randn(batch, generator=make)

    coef = torch.rand(batch, COLUMNS, generator=make) + 0.1
    coef[:, SIGMA] += coef[:, SIGMA_NEXT]
    coef[1::3, STD] = 0.0
    old = draw()
    call = PolicyCall(
        log_prob=old + 2 * CLIP * draw(), shift=draw().square(), drift=1e-4 * draw().square(), old_log_prob=old,
        advantage=draw(), weight=draw().square(), coef=coef, gaussian=True, below=1.0 - CLIP, above=1.0 + CLIP, kl_weight=0.3,
        divergence=1e-5, objective=objective, kl=kl, info=torch.empty(0), rows=torch.empty(0),
    )  # fmt: skip
    return replace(call, **changes)


def run(call: PolicyCall, module: Any = triton) -> tuple[Tensor, Tensor]:
    """(info, rows), on the CPU."""
    device, like = DEVICE if module is triton else "cpu", call.log_prob.dtype
    given = {f.name: getattr(call, f.name) for f in fields(call)}
    there = PolicyCall(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in given.items()})
    there.info = torch.full((8,), 7.0, dtype=like, device=device)
    there.rows = torch.full((5, len(call.log_prob)), 7.0, dtype=like, device=device)
    module.policy_rows(there)
    return there.info.cpu(), there.rows.cpu()


def check(call: PolicyCall) -> tuple[Tensor, Tensor]:
    found, wanted = run(call), run(call, plain)
    assert torch.equal(found[0], wanted[0]), (found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    return found


@pytest.mark.parametrize("kl", range(6))
@pytest.mark.parametrize("objective", range(4))
def test_objectives_and_divergences(objective: int, kl: int) -> None:
    for gaussian in (True, False):
        for weight in (None, torch.tensor([0.5, 2.0, 0.0, 1.5, -1.0])):
            info, rows = check(made(5, objective, kl, gaussian=gaussian, weight=weight))
            assert info.isfinite().all() and float(info[1]) == (3 if gaussian else 5)
            assert bool((rows[2] != 0).any()) and bool((rows[1] != 0).any()) == (kl != plain.KL_NONE)


@pytest.mark.parametrize("absent", [("shift",), ("drift",), ("shift", "drift")])
def test_absent_means(absent: tuple[str, ...]) -> None:
    check(made(5, plain.GUARD, plain.KL_GAUSSIAN, **dict.fromkeys(absent)))


def test_one_row_of_coefficients_serves_all() -> None:
    call = made(5, plain.GUARD, plain.KL_STEPLESS)
    check(replace(call, coef=call.coef[:1]))


@pytest.mark.parametrize("batch", [1, triton_losses.LANES, triton_losses.LANES + 1])
def test_more_rows_than_are_computed_at_a_time(batch: int) -> None:
    check(made(batch, plain.GUARD_RATIO, plain.KL_GAUSSIAN))


def test_bits_do_not_depend_on_how_many_are_computed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    call = made(40)
    wanted = run(call)
    monkeypatch.setattr(triton_losses, "LANES", 32)
    assert all(torch.equal(a, b) for a, b in zip(run(call), wanted, strict=True))


def test_rows_that_all_add_no_noise() -> None:
    call = made(4, plain.GUARD, plain.KL_GAUSSIAN)
    call.coef[:, STD] = 0.0
    info, rows = check(call)
    assert info[[0, 1, 2, 5, 6, 7]].tolist() == [0.0] * 6 and not rows[2:].any()
    assert (float(info[3]), float(info[4])) == (-math.inf, math.inf)


@pytest.mark.parametrize("side", ["below", "above"])
def test_clip_ranges_are_float64(side: str) -> None:
    """A ratio between a bound and its float32 is on the side that the float64 bound puts it."""
    bound = 1.0 + (CLIP if side == "above" else -CLIP)
    single = float(torch.tensor(bound))
    ratio = torch.tensor([math.log((bound + single) / 2)])
    assert single != bound and (float(ratio.double().exp()) > bound) == (single > bound)
    call = made(1, log_prob=ratio, old_log_prob=torch.zeros(1))
    outside = [float(check(replace(call, **{side: value}))[0][5]) for value in (bound, single)]
    assert sorted(outside) == [0.0, 1.0]


@pytest.mark.parametrize("weight", [0.0, -0.25, 1e-12])
def test_any_weight_of_the_divergence(weight: float) -> None:
    check(made(5, kl=plain.KL_LOG_RATIO, kl_weight=weight))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("objective", range(4))
@pytest.mark.parametrize("old", [math.nan, -800.0, 800.0])
def test_what_is_not_finite_is_told_as_torch_tells_it(old: float, objective: int) -> None:
    for advantage in (1.0, 0.0, -1.0):
        call = made(5, objective, gaussian=False)
        call.old_log_prob[2], call.advantage[2] = old, advantage
        for found, wanted in zip(run(call), run(call, plain), strict=True):
            assert torch.equal(found.isnan(), wanted.isnan())
            assert torch.equal(found.nan_to_num(0.0, 1.0, -1.0), wanted.nan_to_num(0.0, 1.0, -1.0))


def test_float64_rows_and_no_rows_are_left_to_torch() -> None:
    call = made(5)
    names = ("log_prob", "shift", "drift", "old_log_prob", "advantage", "weight", "coef")
    wide = replace(call, **{name: getattr(call, name).double() for name in names})
    assert check(wide)[0].dtype == torch.float64
    check(replace(call, **{name: getattr(call, name)[:0] for name in names}))
