"""The policy loss of a batch from its rows' numbers, in float64 torch: csrc/policy.h says the same in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dynamics.columns import SIGMA, SIGMA_NEXT, STD, B
from .base import PolicyCall

PPO, GUARD, GUARD_RATIO, DPPO = range(4)
KL_NONE, KL_GAUSSIAN, KL_STEPLESS, KL_MEAN, KL_VELOCITY, KL_LOG_RATIO = range(6)


def policy_rows(call: PolicyCall) -> None:
    """Fills `info` and `rows`. No gradient is recorded: the derivatives are outputs."""
    batch = len(call.log_prob)

    def wide(t: Tensor | None) -> Tensor:
        return call.log_prob.new_zeros(batch, dtype=torch.float64) if t is None else t.double()

    shift, drift, advantage = wide(call.shift), wide(call.drift), wide(call.advantage)
    weight = torch.ones_like(advantage) if call.weight is None else call.weight.double()
    coef = call.coef.double().expand(batch, -1)
    b, length = coef[:, B], coef[:, SIGMA] - coef[:, SIGMA_NEXT]
    std = torch.where(coef[:, STD] > 0, coef[:, STD], 1.0)
    live = (coef[:, STD] > 0) if call.gaussian else torch.ones_like(std, dtype=torch.bool)
    variance, guard = 2.0 * std * std, call.objective in (GUARD, GUARD_RATIO)
    spread = coef[:, STD] > 0  # without it no Gaussian is there to be far from
    far = torch.where(spread, drift / variance, 0.0)
    log_ratio = wide(call.log_prob) - wide(call.old_log_prob)
    ratio = ((log_ratio + far) * std if guard else log_ratio).exp()
    if call.objective == GUARD:
        weight = weight / length
    plain = -advantage * ratio
    if call.objective == DPPO:
        left = ((advantage > 0) & (ratio > 1.0)) | ((advantage < 0) & (ratio < 1.0))
        outside = left & (far > call.divergence)
        moving, loss = ~outside, torch.where(outside, 0.0, plain * weight)
    else:
        clipped = -advantage * ratio.clamp(call.below, call.above)
        outside = (ratio < call.below) | (ratio > call.above)
        moving, loss = ~outside | (plain > clipped), torch.maximum(plain, clipped) * weight
    on_log_prob = torch.where(moving, -advantage * weight * ratio * (std if guard else torch.ones_like(std)), 0.0)
    on_drift = torch.where(spread, on_log_prob / variance, 0.0) if guard else torch.zeros_like(std)
    on_shift, kl = torch.zeros_like(std), torch.zeros_like(std)
    if call.kl == KL_LOG_RATIO:
        kl = 0.5 * log_ratio * log_ratio
        on_log_prob = on_log_prob + call.kl_weight * log_ratio
    elif call.kl != KL_NONE:
        on_shift = torch.ones_like(std) if call.kl == KL_VELOCITY else b * b
        if call.kl in (KL_GAUSSIAN, KL_STEPLESS):
            on_shift = torch.where(spread, on_shift / variance, 0.0)
        if call.kl == KL_STEPLESS:
            on_shift = on_shift * length
        kl = on_shift * shift
    loss = loss + call.kl_weight * kl
    rows = live.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return torch.where(live, values, 0.0).sum() / rows

    infinity = float("inf")
    extremes = (
        torch.where(live, ratio, -infinity).amax() if batch else advantage.new_tensor(-infinity),
        torch.where(live, ratio, infinity).amin() if batch else advantage.new_tensor(infinity),
    )
    squares = 0.5 * log_ratio * log_ratio
    info = (mean(loss), live.sum(), mean(ratio), *extremes, mean(outside.double()), mean(squares), mean(kl))
    call.info.copy_(torch.stack([value.double() for value in info]))
    derivatives = [torch.where(live, on / rows, 0.0) for on in (on_log_prob, call.kl_weight * on_shift, on_drift)]
    call.rows.copy_(torch.stack([ratio, kl, *derivatives]))
