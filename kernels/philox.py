"""Philox4x32-10 and Box-Muller with the float32 bits of `fastflow/philox.py`, which is the definition.

Constants stand in place: Triton compares every global that a kernel uses at every launch.
"""

import triton
import triton.language as tl


@triton.jit
def _log(u):
    """Natural logarithm of normal positive float32."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the bits of sqrt(1/2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    f2 = f * f
    p = f * 0.08700437843799591 + -0.14267492294311523
    p = p * f + 0.14914770424365997
    p = p * f + -0.1657758355140686
    p = p * f + 0.19963063299655914
    p = p * f + -0.2500133812427521
    p = p * f + 0.3333390951156616
    tail = (f2 * f) * p
    tail = tail - 0.5 * f2
    tail = tail + e * -2.12194440e-4
    return (f + tail) + e * 0.693359375


@triton.jit
def _box_muller(w0, w1):
    """Two uint32 words -> (r cos, r sin)."""
    u = ((w0 >> 8) + 1).to(tl.float32) * 5.960464477539063e-08
    r = tl.sqrt_rn(-2.0 * _log(u))
    quadrant = (w1 + 0x20000000) >> 30
    remainder = (w1 - (quadrant << 30)).to(tl.int32, bitcast=True)
    x = ((remainder >> 6).to(tl.float32) + 0.5) * 9.362675707309822e-08  # 2 pi / 2^26
    z = x * x
    s = z * -0.00019515282474458218 + 0.00833216030150652
    s = s * z + -0.16666655242443085
    c = z * 2.4438451873720624e-05 + -0.001388736767694354
    c = c * z + 0.04166664555668831
    sin = x + (x * z) * s
    cos = (1.0 - 0.5 * z) + (z * z) * c
    odd = (quadrant & 1) != 0
    rotated_sin = tl.where(odd, cos, sin)
    rotated_cos = tl.where(odd, sin, cos)
    rotated_sin = tl.where((quadrant & 2) != 0, -rotated_sin, rotated_sin)
    rotated_cos = tl.where(((quadrant + 1) & 2) != 0, -rotated_cos, rotated_cos)
    return r * rotated_cos, r * rotated_sin


@triton.jit
def normal(seed, step, stream, first, BLOCK: tl.constexpr):
    """BLOCK normal draws of one row, float32: elements first, first + 1, ...  `first` is int64 and a multiple of 4."""
    q = first // 4 + tl.arange(0, BLOCK // 4)
    c0 = q.to(tl.uint32)
    c1 = (q >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + step.to(tl.uint32)
    c3 = tl.zeros_like(c0) + stream.to(tl.uint32)
    k0 = tl.zeros_like(c0) + seed.to(tl.uint32)
    k1 = tl.zeros_like(c0) + (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high_a = tl.umulhi(c0, 0xD2511F53)
        high_b = tl.umulhi(c2, 0xCD9E8D57)
        low_a = c0 * 0xD2511F53
        low_b = c2 * 0xCD9E8D57
        c0 = high_b ^ c1 ^ k0
        c1 = low_b
        c2 = high_a ^ c3 ^ k1
        c3 = low_a
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    z0, z1 = _box_muller(c0, c1)
    z2, z3 = _box_muller(c2, c3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK])
