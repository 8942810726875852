"""The operator of `ff.policy_loss`: one pass over the samples, then the rows' arithmetic; backward in one more pass.

fastflow::policy           (info [8], rows [5, B], log_prob [B]), the first two those of PolicyCall; info[0], the loss, is
                           differentiable in velocity and, where asked, uncond
fastflow::policy_backward  from the inputs and the derivatives in three means of each row
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import policy_rows as plain
from ..backends.base import PolicyCall, StepCall
from .autograd import differentiable
from .library import LIBRARY

_TENSORS = (
    "Tensor sample, Tensor velocity, Tensor next_sample, Tensor coef, Tensor? uncond, Tensor? scale, Tensor? ref_velocity, "
    "Tensor? ref_uncond, Tensor? old_mean, Tensor? mask"
)
_OPTIONS = "int[] token, int score, bool uncond_grad, str rescale, str backend"
_ROWS = (
    "Tensor old_log_prob, Tensor advantage, Tensor? weight, float below, float above, float kl_weight, float divergence, "
    "int objective, int kl"
)
TENSORS, OPTIONS, ROWS = 10, 5, 9
LIBRARY.define(f"policy({_TENSORS}, {_OPTIONS}, {_ROWS}) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(f"policy_backward(Tensor grad, Tensor rows, {_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)")


def _call(tensors: Any, options: Any, **slots: Any) -> StepCall:
    sample, velocity, next_sample, coef, uncond, scale, ref_velocity, ref_uncond, old_mean, mask = tensors
    token, score, _, rescale, _ = options
    batch = sample.shape[0]
    numel = sample.numel() // batch if batch else 0
    return StepCall(
        batch, numel, sample, velocity, uncond, coef, scale, rescale, tuple(token), None, None, None, 0, 0, next_sample, mask,
        score, 0, True, "float32", next_sample.dtype, ref_velocity=ref_velocity, ref_uncond=ref_uncond, old_mean=old_mean,
        **slots,
    )  # fmt: skip


def _policy(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, options = arguments[:TENSORS], arguments[TENSORS : TENSORS + OPTIONS]
    old_log_prob, advantage, weight, below, above, kl_weight, divergence, objective, kl = arguments[TENSORS + OPTIONS :]
    sample, ref_velocity, old_mean, batch = tensors[0], tensors[6], tensors[8], tensors[0].shape[0]
    info, rows, log_prob = _fake(*arguments)
    shift = torch.empty_like(log_prob) if ref_velocity is not None else None
    drift = torch.empty_like(log_prob) if old_mean is not None else None
    step = _call(tensors, options, log_prob=log_prob, shift=shift, drift=drift)
    call = PolicyCall(
        log_prob, shift, drift, old_log_prob, advantage, weight, tensors[3], options[1] < 2, below, above, kl_weight,
        divergence, objective, kl, info, rows,
    )  # fmt: skip
    finish = plain.policy_rows
    if batch:
        backend = backends.select(options[4], sample.device, step)
        backend.step(step)
        finish = getattr(backend, "policy_rows", finish)
    finish(call)
    return info, rows, log_prob


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    sample = arguments[0]
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    batch = sample.shape[0]
    info, rows, log_prob = (sample.new_empty(size, dtype=dtype) for size in ((8,), (5, batch), (batch,)))
    return info, rows, log_prob


def _backward(grad: Tensor, rows: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    tensors, options = arguments[:TENSORS], arguments[TENSORS:]
    in_velocity, in_uncond = _backward_fake(grad, rows, *arguments)
    scaled = rows[2:] * grad
    ref_velocity, old_mean = tensors[6], tensors[8]
    call = _call(
        tensors, options, grad_shift=scaled[1] if ref_velocity is not None else None,
        grad_drift=scaled[2] if old_mean is not None else None,
    )  # fmt: skip
    if call.batch:
        slot = in_uncond if in_uncond.shape == in_velocity.shape else None
        backends.select(options[4], call.sample.device, call).log_prob_backward(call, scaled[0], in_velocity, slot)
    return in_velocity, in_uncond


def _backward_fake(grad: Tensor, rows: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    velocity, uncond, uncond_grad = arguments[1], arguments[4], arguments[TENSORS + 2]
    in_velocity = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    asked = uncond is not None and uncond_grad
    return in_velocity, torch.empty_like(in_velocity) if asked else velocity.new_empty(0)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], *inputs[:TENSORS])
    ctx.options = inputs[TENSORS : TENSORS + OPTIONS]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * (TENSORS + OPTIONS + ROWS)
    if grad is not None:
        rows, *tensors = ctx.saved_tensors
        in_velocity, in_uncond = torch.ops.fastflow.policy_backward(grad[0], rows, *tensors, *ctx.options)
        result[1] = in_velocity
        if tensors[4] is not None and ctx.options[2]:
            result[4] = in_uncond
    return tuple(result)


for _name, _implementation, _stand_in in (
    ("policy", _policy, _fake),
    ("policy_backward", _backward, _backward_fake),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastflow::{_name}", _stand_in, lib=LIBRARY)
differentiable(LIBRARY, "policy", _context, _gradient)
