"""Gradients of the operators. The transition is affine, so each is a few products; only inputs are saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.base import StepCall
from ..dynamics.columns import ODE_A, ODE_B, A, B, P, Q


def step_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (sample, velocity, uncond, coef, scale, noise, seeds, step, given, mask, *options, want) = inputs
    scored = given if given is not None else output[0] if want[0] else None
    ctx.save_for_backward(sample, velocity, uncond, coef, scale, mask, scored)
    ctx.options, ctx.want, ctx.replay = options, want, given is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[5])


def step_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    sample, velocity, uncond, coef, scale, mask, scored = ctx.saved_tensors
    (token, stream, offset, score, reduce, score_rounded, next_dtype, rescale, product_dtype, _) = ctx.options
    g_next, g_log_prob, g_clean, g_ode, g_mean, _ = grads
    batch = sample.shape[0]
    call = StepCall(
        batch, sample.numel() // max(batch, 1), sample, velocity, uncond, coef, scale, rescale, tuple(token), None, None,
        None, stream, offset, scored, mask, score, reduce, score_rounded, product_dtype, next_dtype,
    )  # fmt: skip
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    in_sample = torch.zeros(batch, call.numel, dtype=dtype, device=sample.device)
    in_guided = torch.zeros_like(in_sample)
    in_mean = g_mean
    if g_next is not None and ctx.want[0] and not ctx.replay:
        in_mean = g_next.to(dtype) if in_mean is None else in_mean + g_next.to(dtype)
    if g_log_prob is not None and ctx.want[1] and scored is not None:
        through = reference.mean_gradient(call, g_log_prob).reshape(sample.shape)
        in_mean = through if in_mean is None else in_mean + through
    for gradient, on_sample, on_velocity in ((in_mean, A, B), (g_clean, P, Q), (g_ode, ODE_A, ODE_B)):
        if gradient is not None:
            rows = gradient.reshape(batch, call.numel).to(dtype)
            in_sample += coef[:, on_sample, None] * rows
            in_guided += coef[:, on_velocity, None] * rows
    in_velocity, in_uncond = reference.vjp_combine(call, in_guided)
    result: list[Tensor | None] = [None] * 21
    result[0] = in_sample.reshape(sample.shape).to(sample.dtype)
    result[1] = in_velocity.reshape(velocity.shape).to(velocity.dtype)
    if in_uncond is not None:
        result[2] = in_uncond.reshape(velocity.shape).to(velocity.dtype)
    return tuple(result)


def log_prob_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sample, velocity, next_sample, coef, uncond, scale, mask, *options = inputs
    ctx.save_for_backward(sample, velocity, next_sample, coef, uncond, scale, mask)
    ctx.options = options


def log_prob_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sample, velocity, next_sample, coef, uncond, scale, mask = ctx.saved_tensors
    token, score, reduce, uncond_grad, rescale, backend = ctx.options
    result: list[Tensor | None] = [None] * 13
    in_velocity, in_uncond = torch.ops.fastflow.log_prob_backward(
        grad,
        sample,
        velocity,
        next_sample,
        coef,
        uncond,
        scale,
        mask,
        token,
        score,
        reduce,
        uncond_grad,
        rescale,
        backend,
    )
    result[1] = in_velocity
    if uncond is not None and uncond_grad:
        result[4] = in_uncond
    if ctx.needs_input_grad[0]:
        batch = sample.shape[0]
        call = StepCall(
            batch, sample.numel() // max(batch, 1), sample, velocity, uncond, coef, scale, rescale, tuple(token), None,
            None, None, 0, 0, next_sample, mask, score, reduce, True, "float32", next_sample.dtype,
        )  # fmt: skip
        in_sample = coef[:, A, None] * reference.mean_gradient(call, grad)
        result[0] = in_sample.reshape(sample.shape).to(sample.dtype)
    return tuple(result)
