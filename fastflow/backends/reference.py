"""The definition of a step in plain torch: float32, or float64 for float64 samples. Every product and sum rounds on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import philox
from ..dynamics.columns import C0, ODE_A, ODE_B, STD, A, B, P, Q, W
from .base import TILE, StepCall


def unavailable() -> str | None:
    return None


def refuse(call: StepCall) -> str | None:
    return None


def fold(values: Tensor) -> Tensor:
    """Sum over the last axis, zero-padded to a power of two, by folding halves: s[:h] += s[h:2h]."""
    size = values.shape[-1]
    half = 1 << max(size - 1, 0).bit_length()
    values = torch.nn.functional.pad(values, (0, half - size))
    while half > 1:
        half //= 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def tree_sum(values: Tensor) -> Tensor:
    """Row sums [B] of [B, N]: tiles of 2,048 folded, then added in order. The same bits on every backend and batch."""
    if values.shape[1] == 0:
        return values.new_zeros(values.shape[0])
    padding = -values.shape[1] % TILE
    tiles = fold(torch.nn.functional.pad(values, (0, padding)).reshape(values.shape[0], -1, TILE))
    total = tiles[:, 0]
    for i in range(1, tiles.shape[1]):
        total = total + tiles[:, i]
    return total


def _sqrt(x: Tensor) -> Tensor:
    return x.double().sqrt().to(x.dtype)  # torch's float32 sqrt on CPU was seen one ulp off


def _group_sum(values: Tensor, call: StepCall) -> Tensor:
    """Sum over the group of a rescale, shaped to broadcast against values [B, N]: a token's channels, or the sample."""
    if call.rescale == "clamp":
        return tree_sum(values)[:, None]
    outer, channels, inner = call.token
    sums = fold(values.reshape(-1, outer, channels, inner).transpose(2, 3))  # [B, outer, inner]
    return sums[:, :, None, :].expand(-1, outer, channels, inner).reshape(values.shape)


def combine(v: Tensor, u: Tensor | None, scale: Tensor | None, call: StepCall) -> tuple[Tensor, Tensor | None]:
    """The guided velocity [B, N] and its rescale factor (None where there is none)."""
    if u is None or scale is None:
        return v, None
    guided = u + scale[:, None] * (v - u)
    if call.rescale == "none":
        return guided, None
    norm, guided_norm = _sqrt(_group_sum(v * v, call)), _sqrt(_group_sum(guided * guided, call))
    factor = norm / guided_norm
    keep = guided_norm == 0 if call.rescale == "token" else ~(guided_norm > norm)
    factor = torch.where(keep, torch.ones_like(factor), factor)
    return guided * factor, factor


def combine_backward(
    grad: Tensor, v: Tensor, u: Tensor | None, scale: Tensor | None, factor: Tensor | None, call: StepCall
) -> tuple[Tensor, Tensor | None]:
    """Gradients [B, N] in velocity and uncond of the guided velocity, for its gradient `grad`."""
    if u is None or scale is None:
        return grad, None
    s = scale[:, None]
    if factor is None:
        return s * grad, grad - s * grad
    guided = u + s * (v - u)
    dot, square = _group_sum(grad * guided, call), _group_sum(guided * guided, call)
    norm = _sqrt(_group_sum(v * v, call))
    # where the factor is a constant 1 (nothing was rescaled) the gradient passes as it is
    rescaled = _sqrt(square) > 0 if call.rescale == "token" else _sqrt(square) > norm
    safe_square, safe_norms = torch.where(rescaled, square, 1.0), torch.where(rescaled, _sqrt(square) * norm, 1.0)
    inner = torch.where(rescaled, factor * (grad - guided * (dot / safe_square)), grad)
    through_norm = torch.where(rescaled & (safe_norms > 0), v * (dot / safe_norms), 0.0)
    return s * inner + through_norm, inner - s * inner


class _Rows:
    """A call's tensors as [B, N] in the dtype of the arithmetic, and its coefficients as columns."""

    def __init__(self, call: StepCall) -> None:
        self.call = call
        self.dtype = torch.float64 if call.sample.dtype == torch.float64 else torch.float32
        self.x, self.v = self.source(call.sample), self.source(call.velocity)
        self.u = None if call.uncond is None else self.source(call.uncond)
        self.scale = None if call.scale is None else call.scale.to(self.dtype)
        self.guided, self.factor = combine(self.v, self.u, self.scale, call)

    def load(self, t: Tensor) -> Tensor:
        return t.reshape(self.call.batch, self.call.numel).to(self.dtype)

    def source(self, t: Tensor) -> Tensor:
        """As `load`, for what `rows` may gather."""
        rows = self.call.rows
        return self.load(t if rows is None else t.index_select(0, rows.clamp(0, t.shape[0] - 1)))

    def coef(self, column: int) -> Tensor:
        return self.call.coef[:, column, None]

    def affine(self, on_sample: int, on_velocity: int) -> Tensor:
        product = self.coef(on_velocity) * self.guided
        if self.call.product_dtype == "velocity":
            product = product.to(self.call.velocity.dtype).to(self.dtype)
        return self.coef(on_sample) * self.x + product

    def residual(self, next_stored: Tensor) -> Tensor:
        """next - mean [B, N], 0 where masked."""
        residual = next_stored - self.affine(A, B)
        if self.call.mask is not None:
            residual = torch.where(self.call.mask.reshape(residual.shape), residual, 0.0)
        return residual

    def reference(self) -> Tensor:
        """The reference network's velocity, guided and rescaled as the velocity is."""
        call = self.call
        u = None if call.ref_uncond is None else self.load(call.ref_uncond)
        return combine(self.load(call.ref_velocity), u, self.scale, call)[0]  # type: ignore[arg-type]

    def row_mean(self, difference: Tensor) -> Tensor:
        """Mean of the square over the scored elements, [B]; 0 where none is."""
        if self.call.mask is not None:
            difference = torch.where(self.call.mask.reshape(difference.shape), difference, 0.0)
        n = self.count()
        return torch.where(n == 0, 0.0, tree_sum(difference * difference) / n)

    def count(self) -> Tensor:
        """Elements that are scored, [B]."""
        if self.call.mask is None:
            return torch.full((self.call.batch,), float(self.call.numel), dtype=self.dtype, device=self.x.device)
        return self.call.mask.reshape(self.call.batch, -1).sum(1).to(self.dtype)

    def score(self) -> tuple[Tensor, Tensor]:
        """(c0, w), each [1 or B]."""
        c0, w = self.call.coef[:, C0], self.call.coef[:, W]
        if self.call.score >= 1:
            c0 = torch.zeros_like(c0)
        return c0, torch.ones_like(w) if self.call.score == 2 else w


def _store(slot: Tensor | None, values: Tensor) -> None:
    if slot is not None:
        slot.copy_(values.reshape(slot.shape))


def _draw(rows: _Rows) -> Tensor | None:
    call = rows.call
    if call.noise is not None:
        return rows.load(call.noise)
    if call.seeds is None or call.step is None:
        return None
    z = philox.normal(call.seeds, call.step, call.numel, stream=call.stream, offset=call.offset, dtype=rows.dtype)
    return z


def _log_prob(rows: _Rows, residual: Tensor) -> Tensor:
    call, square = rows.call, residual * residual
    c0, w = rows.score()
    if call.reduce == 2:
        value = torch.where(w[:, None] == 0, c0[:, None], c0[:, None] - w[:, None] * square)
        return value if call.mask is None else torch.where(call.mask.reshape(value.shape), value, 0.0)
    n, total = rows.count(), tree_sum(square)
    if call.reduce == 0:
        value = torch.where(w == 0, c0, c0 - w * (total / n))
    else:
        value = torch.where(w == 0, n * c0, n * c0 - w * total)
    return torch.where(n == 0, 0.0, value)


def step(call: StepCall) -> None:
    if call.batch == 0:
        return
    rows = _Rows(call)
    mean = rows.affine(A, B)
    clean = rows.affine(P, Q) if call.clean is not None else None
    ode_next = rows.affine(ODE_A, ODE_B) if call.ode_next is not None else None
    if call.given is not None:
        value = stored = rows.load(call.given)
    else:
        z = _draw(rows)
        std = rows.coef(STD)
        value = mean if z is None else torch.where(std == 0, mean, mean + std * z)
        stored = value.to(call.next_dtype).to(rows.dtype)
    if call.log_prob is not None:
        _store(call.log_prob, _log_prob(rows, rows.residual(stored if call.score_rounded else value)))
    if call.flags is not None:
        finite = torch.isfinite(mean).all(1) & torch.isfinite(value).all(1)
        flags = (~finite).to(torch.int32)
        if call.rows is not None:
            flags += 2 * ((call.rows < 0) | (call.rows >= call.sample.shape[0])).to(torch.int32)
        call.flags.copy_(flags)
    if call.shift is not None:
        _store(call.shift, rows.row_mean(rows.guided - rows.reference()))
    if call.drift is not None:
        _store(call.drift, rows.row_mean(mean - rows.load(call.old_mean)))  # type: ignore[arg-type]
    _store(call.mean, mean)
    if clean is not None:
        _store(call.clean, clean)
    if ode_next is not None:
        _store(call.ode_next, ode_next)
    _store(call.next_sample, value)


def vjp_combine(call: StepCall, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients [B, N] in velocity and uncond, for the gradient `grad` [B, N] in the guided velocity."""
    rows = _Rows(call)
    return combine_backward(grad, rows.v, rows.u, rows.scale, rows.factor, call)


def mean_gradient(call: StepCall, grad: Tensor) -> Tensor:
    """d log_prob / d mean, contracted with grad ([B], or [B, *] under reduce "none"): [B, N] in the arithmetic's dtype."""
    rows = _Rows(call)
    if call.given is None:
        raise ValueError("mean_gradient needs the stored next sample")
    return _mean_gradient(rows, grad, torch.ones_like(rows.coef(A)))


def _mean_gradient(rows: _Rows, grad: Tensor, factor: Tensor) -> Tensor:
    call = rows.call
    _, w = rows.score()
    slope = (2.0 * w[:, None]) * factor
    if call.reduce == 2:
        slope = grad.reshape(call.batch, call.numel).to(rows.dtype) * slope
    else:
        slope = grad.reshape(-1, 1).to(rows.dtype) * slope
        if call.reduce == 0:
            slope = slope / rows.count()[:, None]
    gradient = slope * rows.residual(rows.load(call.given))  # type: ignore[arg-type]
    dead = w[:, None] == 0
    if call.mask is not None:
        dead = dead | ~call.mask.reshape(gradient.shape)
    return torch.where(dead, 0.0, gradient)


def _row_mean_gradients(rows: _Rows, gradient: Tensor) -> Tensor:
    """The gradient in the guided velocity [B, N], with what comes through `shift` and `drift`."""
    call, n = rows.call, rows.count()[:, None]
    if call.grad_shift is None and call.grad_drift is None:
        return gradient
    if call.grad_shift is not None:
        slope = (call.grad_shift[:, None].to(rows.dtype) * 2.0) / n
        gradient = gradient + slope * (rows.guided - rows.reference())
    if call.grad_drift is not None:
        slope = (call.grad_drift[:, None].to(rows.dtype) * (2.0 * rows.coef(B))) / n
        gradient = gradient + slope * (rows.affine(A, B) - rows.load(call.old_mean))  # type: ignore[arg-type]
    if call.mask is not None:
        gradient = torch.where(call.mask.reshape(gradient.shape), gradient, 0.0)
    return gradient


def log_prob_backward(call: StepCall, grad: Tensor, grad_velocity: Tensor, grad_uncond: Tensor | None) -> None:
    if call.batch == 0:
        return
    rows = _Rows(call)
    gradient = _row_mean_gradients(rows, _mean_gradient(rows, grad, rows.coef(B)))
    in_velocity, in_uncond = combine_backward(gradient, rows.v, rows.u, rows.scale, rows.factor, call)
    _store(grad_velocity, in_velocity)
    if grad_uncond is not None and in_uncond is not None:
        _store(grad_uncond, in_uncond)
