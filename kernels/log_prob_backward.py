"""Closed-form gradient of log_prob, and of shift and drift, in velocity and uncond.

In the velocity that entered the mean, gv = grad * 2*w*b / n * (given - mean), 0 where masked or w == 0, to which shift adds
grad_shift * 2 / n * (v - reference) and drift grad_drift * 2*b / n * (mean - old_mean). Then
    combine:           grad_velocity = scale * gv,  grad_uncond = gv - scale * gv
    rescale, factor f: g = f * (gv - guided * d / S(guided^2)),  d = S(gv * guided) over the token or row,
                       grad_velocity = scale * g + velocity * d / (|guided| |velocity|),  grad_uncond = g - scale * g
"""

import triton
import triton.language as tl

from .convert import at_row, kernel, load, span, store
from .guidance import combine, factor_of, load_guided, token_index
from .reduce import add_tiles, count, fold, put_tiles, tile_sums, weight
from .transition import affine


@kernel
def count_kernel(mask, counts, mask_row, units, programs, TILES: tl.constexpr, LOG: tl.constexpr, ALIGN: tl.constexpr):
    """Adds the number of unmasked elements to counts int32 [batch]; integer atomics give the same sum in any order."""
    row, _, _, index, inside = span(programs, units, TILES, LOG, ALIGN)
    scored = tl.load(at_row(mask, row, mask_row, ALIGN) + index, mask=inside, other=0) != 0
    tl.atomic_add(counts + row, count(scored))


@triton.jit
def gradient(
    coef, x, v, given, mask, grad, counts, row, index, inside, given_row, mask_row, grad_row, numel, form,
    reference, old_mean, grad_shift, grad_drift, old_mean_row, REDUCE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradient in the velocity `v` that entered the mean. `coef` points at the row's coefficients; `reference` holds what
    `v` is to be compared with under `grad_shift`."""
    w = weight(tl.load(coef + 10), form)
    slope = (2.0 * w) * tl.load(coef + 1)
    if REDUCE == 2:
        slope = load(at_row(grad, row, grad_row, ALIGN) + index, inside) * slope
    else:
        slope = tl.load(grad + row * grad_row).to(tl.float32) * slope
    if counts is not None:
        n = tl.load(counts + row).to(tl.float32)
        n = tl.where(n == 0.0, 1.0, n)
    else:
        n = numel.to(tl.float32)
    if REDUCE == 0:
        slope = tl.div_rn(slope, n)
    mean = affine(coef, 0, x, v)
    residual = load(at_row(given, row, given_row, ALIGN) + index, inside) - mean
    live = inside
    if mask is not None:
        live = inside & (tl.load(at_row(mask, row, mask_row, ALIGN) + index, mask=inside, other=0) != 0)
    result = tl.where(w == 0.0, 0.0, tl.where(live, slope * residual, 0.0))
    if grad_shift is not None:
        slope = tl.div_rn(tl.load(grad_shift + row) * 2.0, n)
        result = tl.where(live, result + slope * (v - reference), 0.0)
    if grad_drift is not None:
        slope = tl.div_rn(tl.load(grad_drift + row) * (2.0 * tl.load(coef + 1)), n)
        old = load(at_row(old_mean, row, old_mean_row, ALIGN) + index, inside)
        result = tl.where(live, result + slope * (mean - old), 0.0)
    return result


@triton.jit
def pulls(dot, square, guided_square, RESCALE: tl.constexpr):
    """What a group's rescale takes away along guided and adds along velocity; 0 where nothing was rescaled."""
    _, rescaled = factor_of(square, guided_square, RESCALE)
    norms = tl.sqrt_rn(guided_square) * tl.sqrt_rn(square)
    through = rescaled & (norms > 0.0)
    by_guided = tl.div_rn(dot, tl.where(rescaled, guided_square, 1.0))
    by_velocity = tl.div_rn(dot, tl.where(through, norms, 1.0))
    return tl.where(rescaled, by_guided, 0.0), tl.where(through, by_velocity, 0.0)


@kernel
def dot_kernel(
    sample, velocity, uncond, scale, factors, coef, given, mask, grad, counts,
    ref_velocity, ref_uncond, ref_factors, old_mean, grad_shift, grad_drift, dots,
    sample_row, velocity_row, uncond_row, given_row, mask_row, ref_velocity_row, ref_uncond_row, old_mean_row,
    grad_row, coef_row, scale_row, units, form, batch, programs,
    REDUCE: tl.constexpr, TILES: tl.constexpr, LOG: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Clamp: tile sums [tiles, batch] of gv * guided."""
    row, part, numel, index, inside = span(programs, units, TILES, LOG, ALIGN)
    x = load(at_row(sample, row, sample_row, ALIGN) + index, inside)
    v = load(at_row(velocity, row, velocity_row, ALIGN) + index, inside)
    u = load(at_row(uncond, row, uncond_row, ALIGN) + index, inside)
    guided = combine(v, u, tl.load(scale + row * scale_row))
    reference = None
    if grad_shift is not None:
        reference = load_guided(
            ref_velocity, ref_uncond, scale, row, index, inside, ref_velocity_row, ref_uncond_row, scale_row, ALIGN
        )
        reference = reference * tl.load(ref_factors + row)
    gv = gradient(
        coef + row * coef_row, x, guided * tl.load(factors + row), given, mask, grad, counts, row, index, inside,
        given_row, mask_row, grad_row, numel, form, reference, old_mean, grad_shift, grad_drift, old_mean_row, REDUCE, ALIGN,
    )  # fmt: skip
    put_tiles(dots, tile_sums(gv * guided, TILES, LOG), part * TILES, row, (numel + 2047) // 2048, batch, TILES)


@kernel
def pulls_kernel(dots, totals, pulled, batch, tiles, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """Clamp: pulled [2, batch] from the tile sums of gv * guided and the row sums `totals` [2, batch]."""
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    present = row < batch
    dot = add_tiles(dots, row, present, tiles, batch, UNROLL)
    square = tl.load(totals + row, mask=present, other=0.0)
    guided_square = tl.load(totals + batch + row, mask=present, other=0.0)
    by_guided, by_velocity = pulls(dot, square, guided_square, "clamp")
    tl.store(pulled + row, by_guided, mask=present)
    tl.store(pulled + batch + row, by_velocity, mask=present)


@triton.jit
def combine_backward(gv, v, guided, s, factor, by_guided, by_velocity):
    g = factor * (gv - guided * by_guided)
    return s * g + v * by_velocity, g - s * g


@kernel
def backward_kernel(
    sample, velocity, uncond, scale, factors, pulled, coef, given, mask, grad, counts,
    ref_velocity, ref_uncond, ref_factors, old_mean, grad_shift, grad_drift, grad_velocity, grad_uncond,
    sample_row, velocity_row, uncond_row, given_row, mask_row, ref_velocity_row, ref_uncond_row, old_mean_row,
    grad_velocity_row, grad_uncond_row,
    grad_row, coef_row, scale_row, units, form, batch, programs,
    RESCALE: tl.constexpr, REDUCE: tl.constexpr, TILES: tl.constexpr, LOG: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradients of TILES tiles of one row; every form but the token rescale."""
    row, _, numel, index, inside = span(programs, units, TILES, LOG, ALIGN)
    x = load(at_row(sample, row, sample_row, ALIGN) + index, inside)
    v = load(at_row(velocity, row, velocity_row, ALIGN) + index, inside)
    entered = v
    if uncond is not None:
        u = load(at_row(uncond, row, uncond_row, ALIGN) + index, inside)
        s = tl.load(scale + row * scale_row)
        guided = combine(v, u, s)
        entered = guided
        if RESCALE != "none":
            factor = tl.load(factors + row)
            entered = guided * factor
    reference = None
    if grad_shift is not None:
        reference = load_guided(
            ref_velocity, ref_uncond, scale, row, index, inside, ref_velocity_row, ref_uncond_row, scale_row, ALIGN
        )
        if ref_factors is not None:
            reference = reference * tl.load(ref_factors + row)
    gv = gradient(
        coef + row * coef_row, x, entered, given, mask, grad, counts, row, index, inside,
        given_row, mask_row, grad_row, numel, form, reference, old_mean, grad_shift, grad_drift, old_mean_row, REDUCE, ALIGN,
    )  # fmt: skip
    if uncond is None:
        store(at_row(grad_velocity, row, grad_velocity_row, ALIGN) + index, gv, inside)
    else:
        if RESCALE == "none":
            in_velocity = s * gv
            in_uncond = gv - in_velocity
        else:
            by_guided = tl.load(pulled + row)
            by_velocity = tl.load(pulled + batch + row)
            in_velocity, in_uncond = combine_backward(gv, v, guided, s, factor, by_guided, by_velocity)
        store(at_row(grad_velocity, row, grad_velocity_row, ALIGN) + index, in_velocity, inside)
        if grad_uncond is not None:
            store(at_row(grad_uncond, row, grad_uncond_row, ALIGN) + index, in_uncond, inside)


@kernel
def token_backward_kernel(
    sample, velocity, uncond, scale, coef, given, mask, grad, counts,
    ref_velocity, ref_uncond, ref_factors, old_mean, grad_shift, grad_drift, grad_velocity, grad_uncond,
    sample_row, velocity_row, uncond_row, given_row, mask_row, ref_velocity_row, ref_uncond_row, old_mean_row,
    grad_velocity_row, grad_uncond_row,
    grad_row, coef_row, scale_row, units, form, tokens, programs, inner,
    REDUCE: tl.constexpr, TOKENS: tl.constexpr, LOG: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradients of TOKENS tokens of one row, under the token rescale."""
    program = tl.program_id(0)
    row = (program // programs).to(tl.int64)
    numel = units * ALIGN
    begin = (program % programs) * TOKENS
    token, index, present, inside = token_index(begin, tokens, inner * ALIGN, TOKENS, LOG, CHANNELS, LAST)
    x = load(at_row(sample, row, sample_row, ALIGN) + index, inside)
    v = load(at_row(velocity, row, velocity_row, ALIGN) + index, inside)
    u = load(at_row(uncond, row, uncond_row, ALIGN) + index, inside)
    s = tl.load(scale + row * scale_row)
    guided = combine(v, u, s)
    square, guided_square = fold(v * v, TOKENS, LOG), fold(guided * guided, TOKENS, LOG)
    factor, _ = factor_of(square, guided_square, "token")
    reference = None
    if grad_shift is not None:
        reference = load_guided(
            ref_velocity, ref_uncond, scale, row, index, inside, ref_velocity_row, ref_uncond_row, scale_row, ALIGN
        )
        reference = reference * tl.load(ref_factors + row * tokens + token, mask=present, other=1.0)[:, None]
    gv = gradient(
        coef + row * coef_row, x, guided * factor[:, None], given, mask, grad, counts, row, index, inside,
        given_row, mask_row, grad_row, numel, form, reference, old_mean, grad_shift, grad_drift, old_mean_row, REDUCE, ALIGN,
    )  # fmt: skip
    by_guided, by_velocity = pulls(fold(gv * guided, TOKENS, LOG), square, guided_square, "token")
    in_velocity, in_uncond = combine_backward(
        gv, v, guided, s, factor[:, None], by_guided[:, None], by_velocity[:, None]
    )
    store(at_row(grad_velocity, row, grad_velocity_row, ALIGN) + index, in_velocity, inside)
    if grad_uncond is not None:
        store(at_row(grad_uncond, row, grad_uncond_row, ALIGN) + index, in_uncond, inside)
