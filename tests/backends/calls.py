"""Step calls on random rows, and what a backend makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastflow.backends.base import Backend, StepCall
from fastflow.dynamics.columns import C0, STD, W

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("next_sample", "log_prob", "clean", "ode_next", "mean", "flags")


def rows(batch: int, numel: int, dtype: torch.dtype = torch.float32, gap: int = 0) -> Tensor:
    """Normal [batch, numel]; with a gap, a window of a wider tensor: strided rows that start off any boundary."""
    wide = torch.randn(batch, numel + gap).to(dtype)
    return wide[:, gap // 2 : gap // 2 + numel]


def table(count: int, dead: tuple[int, ...] = ()) -> Tensor:
    """Random coefficients [count, 16]; rows in `dead` have std == 0."""
    coef = torch.randn(count, 16)
    coef[:, STD] = coef[:, STD].abs() + 0.1
    coef[:, W] = 0.5 / coef[:, STD] ** 2
    for row in dead:
        coef[row, [STD, C0, W]] = 0.0
    return coef


def call(batch: int = 3, numel: int = 112, *, gap: int = 0, **fields: Any) -> StepCall:
    """A call with counter noise; `fields` replace its own. Every slot is missing."""
    base = StepCall(
        batch=batch, numel=numel, sample=rows(batch, numel, gap=gap), velocity=rows(batch, numel, torch.bfloat16, gap),
        uncond=None, coef=table(1), scale=None, rescale="none", token=(1, 1, 1), noise=None, seeds=torch.arange(batch) * 7 - 5,
        step=torch.tensor([4]), stream=0, offset=0, given=None, mask=None, score=0, reduce=0, score_rounded=True,
        product_dtype="float32", next_dtype=torch.float32,
    )  # fmt: skip
    return replace(base, **fields)


def guided(batch: int, numel: int, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> StepCall:
    scale = torch.rand(batch) * 4 + 1
    return call(
        batch, numel, velocity=rows(batch, numel, dtype), uncond=rows(batch, numel, dtype), scale=scale, **fields
    )


def forked(batch: int, numel: int, sources: int = 4, **fields: Any) -> StepCall:
    """Rows made of rows of fewer (or more) sources, two of whose indices name none."""
    source = guided(sources, numel, gap=16)
    index = torch.randint(0, sources, (batch,))
    index[0], index[-1] = -3, sources
    own = guided(batch, numel, **fields)
    return replace(own, sample=source.sample, velocity=source.velocity, uncond=source.uncond, rows=index)


def explicit(given_call: StepCall, noise: Tensor) -> StepCall:
    return replace(given_call, noise=noise, seeds=None, step=None)


def replay(given_call: StepCall, given: Tensor) -> StepCall:
    return replace(given_call, given=given, seeds=None, step=None)


def run(backend: Backend, base: StepCall, dtype: torch.dtype = torch.float32, gap: int = 0) -> dict[str, Tensor]:
    """Every output of a call, in slots that start as NaN; `dtype` is that of clean, ode_next and mean."""
    whole = {name: rows(base.batch, base.numel, dtype, gap) for name in ("clean", "ode_next", "mean")}
    whole["next_sample"] = rows(base.batch, base.numel, base.next_dtype, gap)
    whole["log_prob"] = torch.empty(base.batch, base.numel) if base.reduce == 2 else torch.empty(base.batch)
    for slot in whole.values():
        slot.fill_(torch.nan)
    slots = {**whole, "flags": torch.full((base.batch,), 9, dtype=torch.int32)}
    backend.step(replace(base, **slots))
    return slots


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, any NaN equal to any NaN, zeros by their sign too."""
    if not actual.is_floating_point():
        return torch.equal(actual, expected)
    nan = actual.isnan()
    signs = torch.equal(actual.signbit()[~nan], expected.signbit()[~nan])
    return torch.equal(nan, expected.isnan()) and signs and torch.equal(actual[~nan], expected[~nan])


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], names: tuple[str, ...] = OUTPUTS) -> None:
    for name in names:
        different = (actual[name] != expected[name]).sum().item()
        assert same(actual[name], expected[name]), f"{name}: {different} of {actual[name].numel()} values differ"
