"""Row means of a flow-matching loss and their gradient in the velocity, each in one pass over memory.

    target = noise - clean, its noise drawn again or read, or given
    own = velocity - target    old = old_velocity - target    shift = velocity - ref_velocity    (absent: 0)
    means of own^2, old^2, own old, |beta own + (1 - beta) old|, |(1 + beta) old - beta own|, shift^2
    gradient: on_own * 2 / n * own + on_old / n * old + on_shift * 2 / n * shift

The noise and the rounding of every product and sum are those of kernels/transition.py.
"""

import triton
import triton.language as tl

from .convert import at_row, kernel, load, span, store
from .philox import normal
from .reduce import add_tiles, count, in_order, mean_of, put_tiles, tile_counts, tile_sums


@triton.jit
def errors(
    velocity, clean, old_velocity, ref_velocity, target, noise, seeds, step, row, begin, index, inside,
    velocity_row, clean_row, old_row, ref_row, target_row, noise_row, seed_row, step_row, stream, offset,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """own, old and shift of BLOCK elements of one row."""
    if target is not None:
        wanted = load(at_row(target, row, target_row, ALIGN) + index, inside)
    else:
        if noise is not None:
            z = load(at_row(noise, row, noise_row, ALIGN) + index, inside)
        else:
            seed = tl.load(seeds + row * seed_row)
            z = normal(seed, tl.load(step + row * step_row), stream, offset.to(tl.int64) + begin, BLOCK)
        wanted = z - load(at_row(clean, row, clean_row, ALIGN) + index, inside)
    v = load(at_row(velocity, row, velocity_row, ALIGN) + index, inside)
    own = v - wanted
    old = tl.zeros_like(own)
    if old_velocity is not None:
        old = load(at_row(old_velocity, row, old_row, ALIGN) + index, inside) - wanted
    shift = tl.zeros_like(own)
    if ref_velocity is not None:
        shift = v - load(at_row(ref_velocity, row, ref_row, ALIGN) + index, inside)
    return own, old, shift


@triton.jit
def put_row_mean(
    slot, which: tl.constexpr, values, scored, n, part, row, tiles, batch,
    WHOLE: tl.constexpr, TILES: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """To `slot`: mean `which` of the row over the `n` scored elements, [6, batch], or its tile sums, [tiles, 6 * batch]."""
    partial = tile_sums(tl.where(scored, values, 0.0), TILES, LOG)
    column = which * batch + row
    if WHOLE:
        tl.store(slot + column, mean_of(in_order(partial, TILES), n))
    else:
        put_tiles(slot, partial, part * TILES, column, tiles, 6 * batch, TILES)


@kernel
def matching_kernel(
    velocity, clean, old_velocity, ref_velocity, target, noise, seeds, step, mask, sums, counts,
    velocity_row, clean_row, old_row, ref_row, target_row, noise_row, seed_row, step_row, mask_row,
    stream, offset, beta, units, batch, programs,
    WHOLE: tl.constexpr, TILES: tl.constexpr, LOG: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """TILES tiles of one row. WHOLE: the program has the whole row, and `sums` are the means [6, batch]; otherwise tile
    sums, which `means_kernel` adds, and `counts` [tiles, batch] of scored elements under a mask."""
    row, part, numel, index, inside = span(programs, units, TILES, LOG, ALIGN)
    begin = part * (TILES << LOG)
    tiles = (numel + 2047) // 2048
    own, old, shift = errors(
        velocity, clean, old_velocity, ref_velocity, target, noise, seeds, step, row, begin, index, inside,
        velocity_row, clean_row, old_row, ref_row, target_row, noise_row, seed_row, step_row, stream, offset,
        TILES << LOG, ALIGN,
    )  # fmt: skip
    scored = inside
    n = numel
    if mask is not None:
        scored = inside & (tl.load(at_row(mask, row, mask_row, ALIGN) + index, mask=inside, other=0) != 0)
        if WHOLE:
            n = count(scored)
        else:
            put_tiles(counts, tile_counts(scored, TILES, LOG), part * TILES, row, tiles, batch, TILES)
    b = tl.cast(beta, tl.float32)
    plus = b * own + (1.0 - b) * old  # these first: they need both errors and more, and sm_100 spilled with them last
    put_row_mean(sums, 3, tl.abs(plus), scored, n, part, row, tiles, batch, WHOLE, TILES, LOG)
    minus = (1.0 + b) * old - b * own
    put_row_mean(sums, 4, tl.abs(minus), scored, n, part, row, tiles, batch, WHOLE, TILES, LOG)
    put_row_mean(sums, 0, own * own, scored, n, part, row, tiles, batch, WHOLE, TILES, LOG)
    put_row_mean(sums, 1, old * old, scored, n, part, row, tiles, batch, WHOLE, TILES, LOG)
    put_row_mean(sums, 2, own * old, scored, n, part, row, tiles, batch, WHOLE, TILES, LOG)
    put_row_mean(sums, 5, shift * shift, scored, n, part, row, tiles, batch, WHOLE, TILES, LOG)


@kernel
def means_kernel(sums, counts, means, batch, tiles, numel, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """Second pass over long rows: LANES of the 6 * batch means per program from their tile sums."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    present = lane < 6 * batch
    n = tl.zeros_like(lane) + numel
    if counts is not None:
        n = add_tiles(counts, lane % batch, present, tiles, batch, UNROLL)
    total = add_tiles(sums, lane, present, tiles, 6 * batch, UNROLL)
    tl.store(means + lane, mean_of(total, n), mask=present)


@kernel
def matching_backward_kernel(
    velocity, clean, old_velocity, ref_velocity, target, noise, seeds, step, mask, grad, counts, grad_velocity,
    velocity_row, clean_row, old_row, ref_row, target_row, noise_row, seed_row, step_row, mask_row, grad_velocity_row,
    stream, offset, units, batch, programs, TILES: tl.constexpr, LOG: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradient of TILES tiles of one row. grad [3, batch]: in the means of own^2, own old and shift^2."""
    row, part, numel, index, inside = span(programs, units, TILES, LOG, ALIGN)
    begin = part * (TILES << LOG)
    own, old, shift = errors(
        velocity, clean, old_velocity, ref_velocity, target, noise, seeds, step, row, begin, index, inside,
        velocity_row, clean_row, old_row, ref_row, target_row, noise_row, seed_row, step_row, stream, offset,
        TILES << LOG, ALIGN,
    )  # fmt: skip
    n = numel.to(tl.float32)
    if counts is not None:
        n = tl.load(counts + row).to(tl.float32)
        n = tl.where(n == 0.0, 1.0, n)
    on_own = tl.div_rn(tl.load(grad + row) * 2.0, n)
    on_old = tl.div_rn(tl.load(grad + batch + row), n)
    on_shift = tl.div_rn(tl.load(grad + 2 * batch + row) * 2.0, n)
    result = (on_own * own + on_old * old) + on_shift * shift
    if mask is not None:
        live = tl.load(at_row(mask, row, mask_row, ALIGN) + index, mask=inside, other=0) != 0
        result = tl.where(live, result, 0.0)
    store(at_row(grad_velocity, row, grad_velocity_row, ALIGN) + index, result, inside)
