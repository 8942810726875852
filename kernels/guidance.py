"""Classifier-free guidance: the combine, and the factors that bring a combined velocity back to the conditional norm.

Factors are written before the step, by kernels of their own: float32 [batch, groups], one per token ("token", groups =
outer * inner of a row seen as [outer, channels, inner]) or one per row ("clamp", groups = 1).
"""

import triton
import triton.language as tl

from .convert import at_row, kernel, load, source_row, span
from .reduce import add_tiles, fold, put_tiles, tile_sums


@triton.jit
def combine(v, u, s):
    return u + s * (v - u)


@triton.jit
def load_guided(
    velocity, uncond, scale, row, index, inside, velocity_row, uncond_row, scale_row, ALIGN: tl.constexpr
):  # fmt: skip
    """A row's velocities, combined where there is `uncond`, before any rescale."""
    v = load(at_row(velocity, row, velocity_row, ALIGN) + index, inside)
    if uncond is not None:
        u = load(at_row(uncond, row, uncond_row, ALIGN) + index, inside)
        v = combine(v, u, tl.load(scale + row * scale_row))
    return v


@triton.jit
def factor_at(factors, index, inside, inner, RESCALE: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """The factors of a row's elements: of their tokens, or the row's one. LAST: channels are last, inner is 1."""
    if RESCALE == "token":
        token = index // CHANNELS if LAST else index // (CHANNELS * inner) * inner + index % inner
        factor = tl.load(factors + token, mask=inside, other=1.0)
    else:
        factor = tl.load(factors)
    return factor


@triton.jit
def factor_of(square, guided_square, RESCALE: tl.constexpr):
    """sqrt(square) / sqrt(guided_square), or 1 where nothing is to be rescaled; and whether it was."""
    norm = tl.sqrt_rn(square)
    guided_norm = tl.sqrt_rn(guided_square)
    rescaled = guided_norm != 0.0 if RESCALE == "token" else guided_norm > norm
    factor = tl.div_rn(norm, tl.where(guided_norm == 0.0, 1.0, guided_norm))
    return tl.where(rescaled, factor, 1.0), rescaled


@triton.jit
def token_index(
    begin, tokens, inner, TOKENS: tl.constexpr, LOG: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr
):
    """TOKENS tokens of a row: their numbers [TOKENS], elements [TOKENS, 2^LOG], and which of either exist."""
    token = begin + tl.arange(0, TOKENS)
    channel = tl.arange(0, 1 << LOG)
    if LAST:
        index = (token * CHANNELS)[:, None] + channel[None, :]
    else:
        index = ((token // inner) * CHANNELS * inner + token % inner)[:, None] + (channel * inner)[None, :]
    present = token < tokens
    return token, index, present, present[:, None] & (channel < CHANNELS)[None, :]


@kernel
def token_factor_kernel(
    velocity, uncond, scale, rows, factors,
    velocity_row, uncond_row, scale_row, sources, tokens, programs, inner,
    TOKENS: tl.constexpr, LOG: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """factors [batch, tokens] for TOKENS tokens of one row per program."""
    program = tl.program_id(0)
    row = (program // programs).to(tl.int64)
    begin = (program % programs) * TOKENS
    token, index, present, inside = token_index(begin, tokens, inner * ALIGN, TOKENS, LOG, CHANNELS, LAST)
    source = source_row(rows, row, sources)
    v = load(at_row(velocity, source, velocity_row, ALIGN) + index, inside)
    u = load(at_row(uncond, source, uncond_row, ALIGN) + index, inside)
    guided = combine(v, u, tl.load(scale + row * scale_row))
    square, guided_square = fold(v * v, TOKENS, LOG), fold(guided * guided, TOKENS, LOG)
    factor, _ = factor_of(square, guided_square, "token")
    tl.store(factors + row * tokens + token, factor, mask=present)


@kernel
def sample_square_kernel(
    velocity, uncond, scale, rows, squares, guided_squares,
    velocity_row, uncond_row, scale_row, sources, units, batch, programs,
    TILES: tl.constexpr, LOG: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Tile sums [tiles, batch] of velocity^2 and guided^2."""
    row, part, numel, index, inside = span(programs, units, TILES, LOG, ALIGN)
    source = source_row(rows, row, sources)
    v = load(at_row(velocity, source, velocity_row, ALIGN) + index, inside)
    u = load(at_row(uncond, source, uncond_row, ALIGN) + index, inside)
    guided = combine(v, u, tl.load(scale + row * scale_row))
    tiles = (numel + 2047) // 2048
    put_tiles(squares, tile_sums(v * v, TILES, LOG), part * TILES, row, tiles, batch, TILES)
    put_tiles(guided_squares, tile_sums(guided * guided, TILES, LOG), part * TILES, row, tiles, batch, TILES)


@kernel
def sample_factor_kernel(
    squares, guided_squares, factors, totals, batch, tiles, LANES: tl.constexpr, UNROLL: tl.constexpr
):
    """factors [batch] from the tile sums; totals [2, batch], where wanted, keeps both row sums for the backward."""
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    present = row < batch
    square = add_tiles(squares, row, present, tiles, batch, UNROLL)
    guided_square = add_tiles(guided_squares, row, present, tiles, batch, UNROLL)
    factor, _ = factor_of(square, guided_square, "clamp")
    tl.store(factors + row, factor, mask=present)
    if totals is not None:
        tl.store(totals + row, square, mask=present)
        tl.store(totals + batch + row, guided_square, mask=present)
