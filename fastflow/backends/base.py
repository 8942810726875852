"""What a backend is: a module with four functions over one `StepCall`.

unavailable() -> str | None          why this machine cannot run it at all; None if it can
refuse(call) -> str | None           why this call cannot be served; None if it can
step(call) -> None                   writes every slot that is not None
log_prob_backward(call, grad, grad_velocity, grad_uncond) -> None
    gradients of a replay: of log_prob, and in `call.grad_shift` and `call.grad_drift` of the other two row means

A backend may also have policy_rows(call: PolicyCall) -> None; the reference's serves the others, on any device. And

matching(call, beta, means) -> None                      row means of a flow-matching loss, see fastflow/ops/matching.py
matching_backward(call, grad, grad_velocity) -> None
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
RESCALES = ("none", "token", "clamp")
TILE = 2048  # elements of a partial sum


@dataclass(slots=True)
class StepCall:
    """One launch. All tensors are checked, on one device, [B, *] with every row contiguous (row stride = `t.stride(0)`)."""

    batch: int
    numel: int  # elements of a row
    sample: Tensor
    velocity: Tensor
    uncond: Tensor | None
    coef: Tensor  # [1 or B, 16], float32; float64 when sample is float64
    scale: Tensor | None  # [1 or B], dtype of coef
    rescale: str
    token: tuple[int, int, int]  # a row seen as [outer, channels, inner]; the token norm runs over channels
    noise: Tensor | None
    seeds: Tensor | None  # int64 [B]
    step: Tensor | None  # int64 [1 or B]
    stream: int
    offset: int
    given: Tensor | None  # replay: the stored next sample
    mask: Tensor | None  # bool [B, *]; False elements leave the score
    score: int  # index in SCORES
    reduce: int  # index in REDUCTIONS
    score_rounded: bool
    product_dtype: str  # "float32", or "velocity" (reference only)
    next_dtype: torch.dtype  # what the next sample is rounded to before it is scored
    next_sample: Tensor | None = None
    log_prob: Tensor | None = None  # float32 [B]; [B, *] under reduce "none"
    clean: Tensor | None = None
    ode_next: Tensor | None = None
    mean: Tensor | None = None
    flags: Tensor | None = None  # int32 [B]; bit 0: a mean or next value that is not finite; bit 1: rows[r] was clamped
    ref_velocity: Tensor | None = (
        None  # of a reference network, dtype of velocity; guided by ref_uncond as velocity is by uncond
    )
    ref_uncond: Tensor | None = None
    old_mean: Tensor | None = None  # [B, *]
    shift: Tensor | None = None  # float32 [B]: mean over the scored elements of (velocity - ref_velocity)^2, guided
    drift: Tensor | None = None  # float32 [B]: the same of (mean - old_mean)^2
    grad_shift: Tensor | None = None  # float32 [B], of the loss in shift
    grad_drift: Tensor | None = None
    rows: Tensor | None = (
        None  # int64 [B]: row r is made of row rows[r] of sample, velocity, uncond (clamped); step only
    )


@dataclass(slots=True)
class PolicyCall:
    """Rows of a policy loss, all [batch] on one device, in the dtype of the arithmetic (float32, or float64)."""

    log_prob: Tensor
    shift: Tensor | None
    drift: Tensor | None
    old_log_prob: Tensor
    advantage: Tensor
    weight: Tensor | None
    coef: Tensor  # [1 or batch, 16]
    gaussian: bool  # rows with std 0 do not count
    below: float  # 1 - clip
    above: float
    kl_weight: float
    divergence: float
    objective: int
    kl: int
    info: Tensor  # out, [8]: loss, rows, ratio mean, max, min, clip fraction, approximate kl, kl
    rows: Tensor  # out, [5, batch]: ratio, kl, and the loss's derivatives in log_prob, shift, drift


class Backend(Protocol):
    def unavailable(self) -> str | None: ...
    def refuse(self, call: StepCall) -> str | None: ...
    def step(self, call: StepCall) -> None: ...
    def log_prob_backward(
        self, call: StepCall, grad: Tensor, grad_velocity: Tensor, grad_uncond: Tensor | None
    ) -> None: ...
