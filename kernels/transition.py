"""The step: one affine Gaussian transition of a batch of rows, with everything that is wanted from it, in one pass.

    v = velocity, or uncond + scale * (velocity - uncond), times a factor under a rescale
    mean = a*x + b*v    clean = p*x + q*v    ode_next = ode_a*x + ode_b*v
    next = mean + std*z, or mean where std == 0, or the given value
    score of (next as stored - mean), summed over the row, in the given form; a flag for rows that are not finite
    shift, drift: row means of (v - that of a reference network)^2 and (mean - old_mean)^2

Every product and sum is rounded on its own: launch with `enable_fp_fusion=False`. Programs are rows times blocks of a
row, on grid axis 0. Absent tensors are None, which Triton specializes on.
"""

import triton
import triton.language as tl

from .convert import at_row, kernel, load, rounded, source_row, span, store
from .guidance import combine, factor_at, load_guided
from .philox import normal
from .reduce import count, flag, in_order, mean_of, put_tiles, score, tile_counts, tile_sums


@triton.jit
def affine(coef, column: tl.constexpr, x, v):
    """coef[column] * x + coef[column + 1] * v."""
    return tl.load(coef + column) * x + tl.load(coef + column + 1) * v


@triton.jit
def spoiled(total):
    """1 where a sum of x * 0 met an x that is not finite, which makes it NaN; else 0."""
    return (total != total).to(tl.int32)


@triton.jit
def put_mean(
    slot, difference, scored, n, part, row, tiles, batch,
    WHOLE: tl.constexpr, TILES: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """To `slot`: the row's mean of difference^2 over the `n` scored elements, or its tile sums."""
    partial = tile_sums(tl.where(scored, difference * difference, 0.0), TILES, LOG)
    if WHOLE:
        tl.store(slot + row, mean_of(in_order(partial, TILES), n))
    else:
        put_tiles(slot, partial, part * TILES, row, tiles, batch, TILES)


@kernel
def step_kernel(
    sample, velocity, uncond, rows, scale, factors, coef, noise, seeds, step, given, mask,
    ref_velocity, ref_uncond, ref_factors, old_mean,
    next_sample, log_prob, clean, ode_next, mean_out, flags, shift, drift, sums, counts, marks,
    sample_row, velocity_row, uncond_row, noise_row, given_row, mask_row, ref_velocity_row, ref_uncond_row, old_mean_row,
    next_row, clean_row, ode_row, mean_row,
    log_prob_row, flags_row, coef_row, scale_row, seed_row, step_row,
    sources, stream, offset, groups, inner, units, batch, programs, form,
    RESCALE: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, REDUCE: tl.constexpr,
    SCORE_ROUNDED: tl.constexpr, NEXT: tl.constexpr, WHOLE: tl.constexpr, TILES: tl.constexpr, LOG: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """TILES tiles of one row. NEXT: dtype that next_sample is kept in. WHOLE: the program has the whole row and
    finishes its sums; otherwise `finish_kernel` does, from `sums`, `counts` (masked), `marks`, and the tiles' `shift` and
    `drift`, each [tiles, batch].
    """
    row, part, numel, index, inside = span(programs, units, TILES, LOG, ALIGN)
    begin = part * (TILES << LOG)
    tiles = (numel + 2047) // 2048
    coef += row * coef_row

    source = source_row(rows, row, sources)
    x = load(at_row(sample, source, sample_row, ALIGN) + index, inside)
    v = load(at_row(velocity, source, velocity_row, ALIGN) + index, inside)
    if uncond is not None:
        u = load(at_row(uncond, source, uncond_row, ALIGN) + index, inside)
        v = combine(v, u, tl.load(scale + row * scale_row))
        if RESCALE != "none":
            v = v * factor_at(factors + row * groups, index, inside, inner * ALIGN, RESCALE, CHANNELS, LAST)

    mean = affine(coef, 0, x, v)
    if given is not None:
        value = load(at_row(given, row, given_row, ALIGN) + index, inside)
        kept = value
    else:
        if noise is not None:
            std = tl.load(coef + 2)
            z = load(at_row(noise, row, noise_row, ALIGN) + index, inside)
            value = tl.where(std == 0.0, mean, mean + std * z)
        elif seeds is not None:
            std = tl.load(coef + 2)
            seed = tl.load(seeds + row * seed_row)
            z = normal(seed, tl.load(step + row * step_row), stream, offset.to(tl.int64) + begin, TILES << LOG)
            value = tl.where(std == 0.0, mean, mean + std * z)
        else:
            value = mean
        kept = rounded(value, NEXT)

    scored = inside
    n = numel
    if mask is not None:
        scored = inside & (tl.load(at_row(mask, row, mask_row, ALIGN) + index, mask=inside, other=0) != 0)
        if WHOLE:
            n = count(scored)
        elif counts is not None:
            put_tiles(counts, tile_counts(scored, TILES, LOG), part * TILES, row, tiles, batch, TILES)
    if log_prob is not None:
        residual = kept - mean if SCORE_ROUNDED else value - mean
        square = tl.where(scored, residual * residual, 0.0)
        c0 = tl.load(coef + 9)
        w = tl.load(coef + 10)
        if REDUCE == 2:
            one = tl.full([TILES << LOG], 1.0, tl.float32)
            each = score(c0 * one, w * one, square, one, form, 1)
            store(at_row(log_prob, row, log_prob_row, ALIGN) + index, tl.where(scored, each, 0.0), inside)
        else:
            partial = tile_sums(square, TILES, LOG)
            if WHOLE:
                tl.store(log_prob + row * log_prob_row, score(c0, w, in_order(partial, TILES), n, form, REDUCE))
            else:
                put_tiles(sums, partial, part * TILES, row, tiles, batch, TILES)
    if shift is not None:
        reference = load_guided(
            ref_velocity, ref_uncond, scale, row, index, inside, ref_velocity_row, ref_uncond_row, scale_row, ALIGN
        )
        if ref_factors is not None:
            reference = reference * factor_at(
                ref_factors + row * groups, index, inside, inner * ALIGN, RESCALE, CHANNELS, LAST
            )
        put_mean(shift, v - reference, scored, n, part, row, tiles, batch, WHOLE, TILES, LOG)
    if drift is not None:
        old = load(at_row(old_mean, row, old_mean_row, ALIGN) + index, inside)
        put_mean(drift, mean - old, scored, n, part, row, tiles, batch, WHOLE, TILES, LOG)

    if flags is not None:  # a mean that is not finite leaves no sum with it finite; what is not there counts as 0
        poison = value * 0.0
        if given is not None:
            poison += mean * 0.0
        if WHOLE:
            tl.store(flags + row * flags_row, flag(spoiled(tl.sum(poison, axis=0)), rows, row, sources))
        else:
            each = spoiled(tl.sum(tl.reshape(poison, [TILES, 1 << LOG]), axis=1))
            put_tiles(marks, each, part * TILES, row, tiles, batch, TILES)

    if clean is not None:
        store(at_row(clean, row, clean_row, ALIGN) + index, affine(coef, 3, x, v), inside)
    if ode_next is not None:
        store(at_row(ode_next, row, ode_row, ALIGN) + index, affine(coef, 5, x, v), inside)
    if mean_out is not None:
        store(at_row(mean_out, row, mean_row, ALIGN) + index, mean, inside)
    if next_sample is not None:
        store(at_row(next_sample, row, next_row, ALIGN) + index, value, inside)
