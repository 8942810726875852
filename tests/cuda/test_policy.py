"""The rows of a policy loss on CUDA: the bits of the cpu backend in the emulator, whose exp is the C library's as well.

A GPU's exp and torch's differ from it by ulps of float64, so the float32 made of it is the same or the next one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastflow.backends import cpu, policy_rows
from fastflow.backends.base import PolicyCall
from fastflow.dynamics.columns import STD
from tests.backends.calls import table
from tests.cuda.backends import OnGpu
from tests.tolerance import ulp

BATCHES = (1, 2, 24, 255, 256, 257, 700)
ABSENT = ("shift", "drift", "weight")


def policy(batch: int, objective: int = 0, kl: int = 0, **fields: Any) -> PolicyCall:
    """A call whose ratios lie around 1, some beyond the clip."""
    old = torch.randn(batch)
    base = PolicyCall(
        log_prob=old + 0.2 * torch.randn(batch), shift=torch.rand(batch), drift=0.1 * torch.rand(batch), old_log_prob=old,
        advantage=torch.randn(batch), weight=torch.rand(batch) + 0.5, coef=table(batch), gaussian=True, below=0.9, above=1.2,
        kl_weight=0.3, divergence=0.05, objective=objective, kl=kl, info=torch.full((8,), torch.nan),
        rows=torch.full((5, batch), torch.nan),
    )  # fmt: skip
    return replace(base, **fields)


def run(backend: Any, call: PolicyCall, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    slots = [torch.full(t.shape, torch.nan, dtype=dtype) for t in (call.info, call.rows)]
    backend.policy_rows(replace(call, info=slots[0], rows=slots[1]))
    return slots[0], slots[1]


def check(device: Any, call: PolicyCall) -> tuple[Tensor, Tensor]:
    found = run(device, call)
    for actual, exact in zip(found, run(policy_rows, call, torch.float64), strict=True):
        wanted = exact.float().double()
        near = (actual.double() - wanted).abs() <= ulp(wanted, torch.float32)
        assert bool((near | (actual == wanted)).all()), f"{actual[~near].tolist()}, wanted {wanted[~near].tolist()}"
    if device is not OnGpu and cpu.unavailable() is None:
        for actual, expected in zip(found, run(cpu, call), strict=True):
            assert torch.equal(actual, expected)
    return found


@pytest.mark.parametrize("kl", range(6))
@pytest.mark.parametrize("objective", range(4))
def test_objectives_and_divergences(device: Any, objective: int, kl: int) -> None:
    check(device, policy(24, objective, kl))
    check(device, policy(24, objective, kl, **dict.fromkeys(ABSENT if objective == 0 and kl in (0, 5) else ["weight"])))


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(device: Any, batch: int) -> None:
    info, rows = check(device, policy(batch, 2, 1))
    assert float(info[1]) == batch and bool((rows[0] > 0).all())


@pytest.mark.parametrize("objective", range(4))
@pytest.mark.parametrize("old", [float("nan"), -800.0, 800.0])
def test_what_is_not_finite_is_told_as_torch_tells_it(device: Any, old: float, objective: int) -> None:
    for advantage in (1.0, 0.0, -1.0):
        call = policy(5, objective)
        call.old_log_prob[2], call.advantage[2] = old, advantage
        for found, wanted in zip(run(device, call), run(policy_rows, call, torch.float64), strict=True):
            wanted = wanted.float()
            near = (found - wanted).abs() <= ulp(wanted.double(), torch.float32)
            assert bool((near | (found == wanted) | (found.isnan() & wanted.isnan())).all()), (found, wanted)


@pytest.mark.parametrize("batch", [4, 300])
def test_rows_without_noise_do_not_count(device: Any, batch: int) -> None:
    call = policy(batch, 1, 1, coef=table(batch, dead=(1, batch - 1)))
    info, rows = check(device, call)
    assert float(info[1]) == batch - 2 and not rows[2:, [1, batch - 1]].any()
    check(device, replace(call, gaussian=False))
    call.coef[:, STD] = 0.0
    info, rows = check(device, call)
    assert float(info[0]) == float(info[1]) == 0.0 and float(info[3]) == -torch.inf and not rows[2:].any()


def test_one_row_of_coefficients_and_rows_of_a_wider_table(device: Any) -> None:
    check(device, policy(24, 1, 2, coef=table(1)))
    check(device, policy(24, 1, 2, coef=torch.cat([table(24), table(24)], 1)[:, 16:]))


def test_no_rows(device: Any) -> None:
    info, _ = check(device, policy(0))
    assert info.tolist() == [0.0, 0.0, 0.0, -torch.inf, torch.inf, 0.0, 0.0, 0.0]


def test_rows_are_added_in_their_order(device: Any) -> None:
    """Sums whose order shows, over more rows than threads."""
    batch = 600
    call = policy(batch, weight=None, kl_weight=0.0)
    call.log_prob = call.old_log_prob
    call.advantage[:] = 1.0
    call.advantage[::3], call.advantage[2::3] = 1e20, -1e20
    sums = []
    for order in (torch.arange(batch), torch.arange(batch).flip(0).roll(1)):
        ordered = replace(call, advantage=call.advantage[order].clone())
        total = 0.0
        for value in ordered.advantage.tolist():
            total += -value
        info, _ = run(device, ordered)
        assert float(info[0]) == float(torch.tensor(total / batch, dtype=torch.float64).float())
        sums.append(total)
    assert sums[0] != sums[1]


def test_a_ratio_that_is_not_finite(device: Any) -> None:
    call = policy(40)
    call.log_prob[7] = 1e4
    info, rows = run(device, call)
    wanted, wanted_rows = run(cpu if cpu.unavailable() is None else policy_rows, call)
    assert float(rows[0, 7]) == float(info[3]) == torch.inf
    assert torch.equal(info.isnan(), wanted.isnan()) and torch.equal(rows.isnan(), wanted_rows.isnan())


def test_float64(device: Any) -> None:
    """It is finished by plain torch."""
    call = policy(24, 1, 1)
    wide = {
        n: t.double() for n in ("log_prob", "old_log_prob", "advantage", "coef") if (t := getattr(call, n)) is not None
    }
    call = replace(call, **wide)
    found, wanted = (run(backend, call, torch.float64) for backend in (device, policy_rows))
    assert torch.equal(found[0], wanted[0]) or device is OnGpu
    assert bool(found[0].isfinite().all())
