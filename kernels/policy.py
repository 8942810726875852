"""The rows of a policy loss and their means, in float64: csrc/policy.h says the same in C++.

One program does it all. It takes LANES rows at a time, a row a lane, and leaves what is summed over rows in scratch; then
lanes take a sum each and add the rows in order. Every sum thus has one order, whatever LANES is.
"""

import triton
import triton.language as tl

from .convert import kernel
from .reduce import add_tiles, count


@triton.jit
def float64_of(bits):
    """float64 from its bits: Triton passes a float as float32, which is too coarse for clip ranges of 1e-5."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def wide(pointer, present, absent):
    """float64 of the float32 at `pointer`, `absent` where not `present`."""
    return tl.load(pointer, mask=present, other=absent).to(tl.float64)


@triton.jit
def counts_in(coef, row, coef_row, gaussian, present):
    """Whether rows count: all, but under a Gaussian score only those with a std."""
    std = tl.load(coef + row.to(tl.int64) * coef_row + 2, mask=present, other=0.0)
    return present & ((gaussian == 0) | (std > 0.0))


@triton.jit
def surrogate(ratio, far, advantage, weight, below, above, divergence, objective):
    """(loss, whether the ratio is outside its range, whether the loss moves with it) of rows."""
    plain = -advantage * ratio
    left = ((advantage > 0.0) & (ratio > 1.0)) | ((advantage < 0.0) & (ratio < 1.0))
    far_left = left & (far > divergence)
    bounded = tl.where(ratio < below, below, tl.where(ratio > above, above, ratio))
    clipped = -advantage * bounded
    beyond = (ratio < below) | (ratio > above)
    higher = plain > clipped
    taken = higher | (plain != plain)  # NaN stays
    dppo = objective == 3
    outside = tl.where(dppo, far_left, beyond)
    loss = tl.where(dppo, tl.where(far_left, 0.0, plain * weight), tl.where(taken, plain, clipped) * weight)
    return loss, outside, tl.where(dppo, far_left == 0, (beyond == 0) | higher)


@triton.jit
def divergence_of(log_ratio, shift, b, variance, spread, length, kl):
    """(divergence, its derivative in shift) of rows."""
    slope = tl.where(kl == 4, 1.0, b * b)
    slope = tl.where((kl == 1) | (kl == 2), tl.where(spread, slope / variance, 0.0), slope)
    slope = tl.where(kl == 2, slope * length, slope)
    slope = tl.where((kl == 0) | (kl == 5), 0.0, slope)
    value = tl.where(kl == 5, 0.5 * log_ratio * log_ratio, slope * shift)
    return tl.where(kl == 0, 0.0, value), slope


@triton.jit
def put(scratch, column: tl.constexpr, row, value, live, present):
    tl.store(scratch + row * 8 + column, tl.where(live, value, 0.0), mask=present)


@kernel
def policy_kernel(
    log_prob, shift, drift, old_log_prob, advantage, weight, coef, info, rows, scratch,
    coef_row, batch, has, gaussian, objective, kl,
    below: tl.int64, above: tl.int64, kl_weight: tl.int64, divergence: tl.int64,
    LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """info [8] and rows [5, batch] of `PolicyCall` (fastflow/backends/base.py), by way of scratch float64 [batch, 8].

    has: 1 with shift, 2 with drift, 4 with weight; absent ones are any pointer, and not read, so that there is one variant.
    objective: 0 PPO, 1 guard, 2 guard ratio, 3 DPPO. kl: 0 none, 1 Gaussian, 2 without the step's length, 3 of means, 4 of
    velocities, 5 of the log-ratio. below, above, kl_weight and divergence are float64 bits.
    """
    lower, upper, kl_scale = float64_of(below), float64_of(above), float64_of(kl_weight)
    allowed = float64_of(divergence)
    guard = (objective == 1) | (objective == 2)
    shifts, drifts = tl.where((has & 1) != 0, batch, 0), tl.where((has & 2) != 0, batch, 0)
    weights = tl.where((has & 4) != 0, batch, 0)
    lanes = tl.arange(0, LANES)

    number = batch * 0
    start = batch * 0
    while start < batch:
        row = start + lanes
        number += count(counts_in(coef, row, coef_row, gaussian, row < batch))
        start += LANES
    divisor = tl.where(number > 0, number, 1).to(tl.float64)

    most = tl.full([LANES], float("-inf"), tl.float64)
    least = tl.full([LANES], float("inf"), tl.float64)
    odd = batch * 0  # ratios that are NaN
    start = batch * 0
    while start < batch:
        row = start + lanes
        present = row < batch
        at = coef + row.to(tl.int64) * coef_row
        b, std = wide(at + 1, present, 0.0), wide(at + 2, present, 0.0)
        length = wide(at + 7, present, 1.0) - wide(at + 8, present, 0.0)
        gain = wide(advantage + row, present, 0.0)
        live = counts_in(coef, row, coef_row, gaussian, present)

        spread = std > 0.0
        std = tl.where(spread, std, 1.0)
        variance = 2.0 * std * std
        far = tl.where(spread, wide(drift + row, row < drifts, 0.0) / variance, 0.0)
        log_ratio = wide(log_prob + row, present, 0.0) - wide(old_log_prob + row, present, 0.0)
        ratio = tl.exp(tl.where(guard, (log_ratio + far) * std, log_ratio))
        scale = wide(weight + row, row < weights, 1.0) / tl.where(objective == 1, length, 1.0)
        loss, outside, moving = surrogate(ratio, far, gain, scale, lower, upper, allowed, objective)
        apart = wide(shift + row, row < shifts, 0.0)
        distance, on_shift = divergence_of(log_ratio, apart, b, variance, spread, length, kl)
        on_ratio = tl.where(moving, -gain * scale * ratio * tl.where(guard, std, 1.0), 0.0)
        on_log_prob = tl.where(kl == 5, on_ratio + kl_scale * log_ratio, on_ratio)
        on_drift = tl.where(guard & spread, on_ratio / variance, 0.0)

        out = rows + row
        tl.store(out, ratio.to(tl.float32), mask=present)
        tl.store(out + batch, distance.to(tl.float32), mask=present)
        tl.store(out + 2 * batch, tl.where(live, on_log_prob / divisor, 0.0).to(tl.float32), mask=present)
        tl.store(out + 3 * batch, tl.where(live, kl_scale * on_shift / divisor, 0.0).to(tl.float32), mask=present)
        tl.store(out + 4 * batch, tl.where(live, on_drift / divisor, 0.0).to(tl.float32), mask=present)
        put(scratch, 0, row, loss + kl_scale * distance, live, present)
        put(scratch, 2, row, ratio, live, present)
        put(scratch, 5, row, tl.where(outside, 1.0, 0.0), live, present)
        put(scratch, 6, row, 0.5 * log_ratio * log_ratio, live, present)
        put(scratch, 7, row, distance, live, present)
        odd += count(live & (ratio != ratio))
        most = tl.where(live & (ratio > most), ratio, most)
        least = tl.where(live & (ratio < least), ratio, least)
        start += LANES

    tl.debug_barrier()  # the rows' numbers are written by other threads than read them
    place = tl.arange(0, 8)
    summed = (place != 1) & (place != 3) & (place != 4)
    value = add_tiles(scratch, place, summed, batch, 8, UNROLL) / divisor
    value = tl.where(place == 1, number.to(tl.float64), value)
    value = tl.where(place == 3, tl.max(most, axis=0), value)
    value = tl.where(place == 4, tl.min(least, axis=0), value)
    value = tl.where((odd > 0) & ((place == 3) | (place == 4)), float("nan"), value)
    tl.store(info + place, value.to(tl.float32))
