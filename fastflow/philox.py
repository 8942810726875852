"""Counter-based Gaussian noise: Philox4x32-10 and Box-Muller, as plain torch.

This file is the definition. `csrc/philox.h` and `kernels/philox.py` repeat its operation order, so that all of them give the
same float32 bits: every product and every sum is rounded on its own, and nothing but IEEE add, multiply and sqrt is used.

Source of Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The polynomials are
minimax fits of this project (relative error of ln 3.2e-8, of sin 3.8e-9, absolute error of cos 9.6e-11, before rounding).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

# ln(1 + f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]; P, lowest order first.
LOG_P = (
    0.3333390951156616,
    -0.2500133812427521,
    0.19963063299655914,
    -0.1657758355140686,
    0.14914770424365997,
    -0.14267492294311523,
    0.08700437843799591,
)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # high part has 9 significant bits: exponent * LN2_HIGH is exact
SQRT_HALF_BITS = 0x3F3504F3  # float32 sqrt(1/2)
# sin x = x + x z S(z), cos x = 1 - z/2 + z^2 C(z), z = x^2, |x| <= pi/4; lowest order first.
SIN_S = (-0.16666655242443085, 0.00833216030150652, -0.00019515282474458218)
COS_C = (0.04166664555668831, -0.001388736767694354, 2.4438451873720624e-05)
TURN = 2.0 * math.pi / (1 << 26)  # one unit of (remainder >> 6), in radians


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32. Every tensor is int64 holding an unsigned 32-bit word; shapes broadcast. Returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # the 64-bit product wraps into the sign; its bits are right
        c0, c1, c2, c3 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, p1 & MASK32, ((p0 >> 32) & MASK32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded float32 square root: torch's own on CPU was seen one ulp off."""
    return x.double().sqrt().float()


def _log(u: Tensor) -> Tensor:
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.float()
    f2 = f * f
    tail = (f2 * f) * _horner(LOG_P, f)
    tail = tail - 0.5 * f2
    tail = tail + e * LN2_LOW
    return (f + tail) + e * LN2_HIGH


def _sincos(w: Tensor) -> tuple[Tensor, Tensor]:
    quadrant = ((w + (1 << 29)) & MASK32) >> 30
    remainder = w - (quadrant << 30)
    remainder = torch.where(remainder >= 1 << 31, remainder - (1 << 32), remainder)  # as int32
    x = ((remainder >> 6).float() + 0.5) * TURN  # the middle of the 64 angles that the shift merges; the sum is exact
    z = x * x
    sin = x + (x * z) * _horner(SIN_S, z)
    cos = (1.0 - 0.5 * z) + (z * z) * _horner(COS_C, z)
    odd = (quadrant & 1).bool()
    sin, cos = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    sin = torch.where((quadrant & 2).bool(), -sin, sin)
    cos = torch.where(((quadrant + 1) & 2).bool(), -cos, cos)
    return sin, cos


def box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two words (int64 holding uint32) -> two float32 normal draws (r cos, r sin), |z| <= 5.77."""
    u = ((w0 >> 8) + 1).float() * 2.0**-24
    r = _sqrt(-2.0 * _log(u))
    sin, cos = _sincos(w1)
    return r * cos, r * sin


def box_muller64(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """The same draws in float64 library arithmetic with the full 32-bit angle: what `box_muller` is within 1e-6 of."""
    r = (-2.0 * (((w0 >> 8) + 1).double() * 2.0**-24).log()).sqrt()
    angle = w1.double() * (2.0 * math.pi / 2.0**32)
    return r * angle.cos(), r * angle.sin()


def normal(
    seeds: Tensor, step: Tensor, numel: int, *, stream: int = 0, offset: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal draws [B, numel] for int64 seeds [B] and int64 step [1] or [B].

    Element e of a row is drawn from counter ((offset + e) / 4 low, high, step, stream) under the row's 64-bit seed; offset is a
    multiple of 4. float32, or float64 for the exact values that float32 approximates.
    """
    words = _words(seeds, step, numel, stream, offset)
    draw = box_muller64 if dtype == torch.float64 else box_muller
    z = torch.stack([*draw(words[0], words[1]), *draw(words[2], words[3])], dim=-1)
    return z.reshape(seeds.shape[0], -1)[:, :numel]


def uniform(seeds: Tensor, step: Tensor, numel: int, *, stream: int = 0) -> Tensor:
    """Even draws of (0, 1], float64 [B, numel]: element e of a row is word e % 4 of counter (e / 4, 0, step, stream), its upper
    24 bits plus 1, times 2^-24."""
    words = torch.stack(_words(seeds, step, numel, stream, 0), dim=-1)
    return ((words.reshape(seeds.shape[0], -1)[:, :numel] >> 8) + 1).double() * 2.0**-24


def _words(seeds: Tensor, step: Tensor, numel: int, stream: int, offset: int) -> list[Tensor]:
    """The four words of every counter that `numel` elements of a row take, [B, ceil(numel / 4)] each."""
    q = torch.arange(offset // 4, offset // 4 + (numel + 3) // 4, dtype=torch.int64, device=seeds.device)[None]
    seeds, step = seeds[:, None], step.to(torch.int64)[:, None]
    words = philox4x32(
        (q & MASK32, (q >> 32) & MASK32, step & MASK32, torch.full_like(step, stream & MASK32)),
        (seeds & MASK32, (seeds >> 32) & MASK32),
    )
    return list(torch.broadcast_tensors(*words))
