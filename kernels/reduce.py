"""Row sums whose bits do not depend on grid, threads or batch.

A row is cut into tiles of 2,048 elements, padded with zeros. A tile is folded by halves (s[:h] += s[h:2h] for h = 1024,
512, .. 1), then the tile sums are added from left to right. A row that one program covers is summed there. For longer
rows the programs write their tile sums to scratch [tiles, batch] and `finish_kernel` adds them.
"""

import triton
import triton.language as tl

from .convert import kernel


@triton.jit
def fold(x, ROWS: tl.constexpr, LOG: tl.constexpr):
    """[ROWS, 2^LOG] -> [ROWS] by folding halves. `tl.split` wants both halves in one thread, so that down to 32 elements the
    fold goes through shared memory once; `tl.sum` would do so, or shuffle every element, at each of its steps.
    """
    for i in tl.static_range(LOG):
        pairs = tl.reshape(x, [ROWS, 2, 1 << (LOG - 1 - i)])
        if LOG > 8 and LOG - 1 - i >= 5:
            low, high = tl.split(tl.permute(pairs, [0, 2, 1]))
            x = low + high
        else:
            x = tl.sum(pairs, axis=1)
    return tl.reshape(x, [ROWS])


@triton.jit
def tile_sums(x, TILES: tl.constexpr, LOG: tl.constexpr):
    """Block of TILES << LOG values -> [TILES] tile sums. LOG is 11, or less for one tile whose upper part is padding: it
    would fold in zeros, which change no bit."""
    return fold(tl.reshape(x, [TILES, 1 << LOG]), TILES, LOG)


@triton.jit
def tile_counts(condition, TILES: tl.constexpr, LOG: tl.constexpr):
    """Block of conditions -> int32 [TILES]: how many hold in each tile. Summed in float32, exactly: the interpreters of
    older Triton versions widen integer sums."""
    return tl.sum(tl.reshape(tl.where(condition, 1.0, 0.0), [TILES, 1 << LOG]), axis=1).to(tl.int32)


@triton.jit
def count(condition):
    """How many of a block's conditions hold, int32; exact for blocks of up to 2^24."""
    return tl.sum(tl.where(condition, 1.0, 0.0), axis=0).to(tl.int32)


@triton.jit
def in_order(x, TILES: tl.constexpr):
    """[TILES] -> their sum from left to right. The other terms of each `tl.sum` are zeros, so it selects."""
    place = tl.arange(0, TILES)
    total = tl.sum(tl.where(place == 0, x, 0.0), axis=0)
    for i in tl.static_range(1, TILES):
        total = total + tl.sum(tl.where(place == i, x, 0.0), axis=0)
    return total


@triton.jit
def put_tiles(scratch, values, first_tile, row, tiles, batch, TILES: tl.constexpr):
    """Writes [TILES] values of one row to scratch [tiles, batch]."""
    tile = first_tile + tl.arange(0, TILES)
    tl.store(scratch + tile.to(tl.int64) * batch + row, values, mask=tile < tiles)


@triton.jit
def add_tiles(scratch, row, present, tiles, batch, UNROLL: tl.constexpr):
    """Sums of scratch [tiles, batch] over tiles, in order, for a vector of rows; UNROLL loads in flight at a time."""
    total = tl.load(scratch + row, mask=present, other=0)
    start = tiles * 0 + 1  # not `range`: the interpreters of older Triton versions cannot take tensors for bounds
    while start < tiles:
        for i in tl.static_range(UNROLL):
            tile = tl.zeros_like(row) + (start + i)
            value = tl.load(scratch + tile.to(tl.int64) * batch + row, mask=present & (tile < tiles), other=0)
            total = total + value
        start += UNROLL
    return total


@triton.jit
def weight(w, form):
    """The weight of a row's squares under score `form` (SCORES of fastflow/dynamics/columns.py)."""
    return tl.where(form == 2, 1.0, w)


@triton.jit
def score(c0, w, total, n, form, REDUCE: tl.constexpr):
    """log_prob of rows with `n` scored elements and sum of squares `total`, float32."""
    c0 = tl.where(form >= 1, 0.0, c0)
    w = weight(w, form)
    n = n.to(tl.float32)
    if REDUCE == 0:
        value = tl.where(w == 0.0, c0, c0 - w * tl.div_rn(total, tl.where(n == 0.0, 1.0, n)))
    else:
        value = tl.where(w == 0.0, n * c0, n * c0 - w * total)
    return tl.where(n == 0.0, 0.0, value)


@triton.jit
def mean_of(total, n):
    """Mean of `n` elements from their sum; 0 for none."""
    n = n.to(tl.float32)
    return tl.where(n == 0.0, 0.0, tl.div_rn(total, tl.where(n == 0.0, 1.0, n)))


@triton.jit
def flag(bad, rows, row, sources):
    """The flags of rows: 1 where `bad` elements are not finite, 2 where rows[row] names no source."""
    result = (bad > 0).to(tl.int32)
    if rows is not None:
        index = tl.load(rows + row)
        result += tl.where((index < 0) | (index >= sources), 2, 0)
    return result


@kernel
def finish_kernel(
    sums, counts, marks, shifts, drifts, coef, rows, log_prob, flags, shift, drift,
    coef_row, log_prob_row, flags_row, sources, batch, tiles, numel, form,
    REDUCE: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Second pass of a step over long rows: numbers of LANES rows per program from their tiles' scratch."""
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    present = row < batch
    wide = row.to(tl.int64)
    n = add_tiles(counts, row, present, tiles, batch, UNROLL) if counts is not None else tl.zeros_like(row) + numel
    if log_prob is not None:
        total = add_tiles(sums, row, present, tiles, batch, UNROLL)
        c0 = tl.load(coef + wide * coef_row + 9, mask=present, other=0.0)
        w = tl.load(coef + wide * coef_row + 10, mask=present, other=0.0)
        tl.store(log_prob + wide * log_prob_row, score(c0, w, total, n, form, REDUCE), mask=present)
    if flags is not None:
        bad = add_tiles(marks, row, present, tiles, batch, UNROLL)
        tl.store(flags + wide * flags_row, flag(bad, rows, tl.where(present, wide, 0), sources), mask=present)
    if shift is not None:
        total = add_tiles(shifts, row, present, tiles, batch, UNROLL)
        tl.store(shift + wide, mean_of(total, n), mask=present)
    if drift is not None:
        total = add_tiles(drifts, row, present, tiles, batch, UNROLL)
        tl.store(drift + wide, mean_of(total, n), mask=present)
