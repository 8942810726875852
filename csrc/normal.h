// SPDX-License-Identifier: Apache-2.0
// Two random words -> two standard normal draws (Box-Muller) by fixed polynomials and an IEEE square root.
// fastflow/philox.py is the definition of the coefficients and of the order of operations.
#pragma once

#include "lane.h"

namespace fastflow {

// ln u for normal u > 0.
template <class L>
FASTFLOW_FN typename L::Float log_poly(typename L::Float u) {
  using Float = typename L::Float;
  using Bits = typename L::Bits;
  const Bits bits = L::as_bits(u);
  const auto exponent = L::as_int(bits - 0x3F3504F3u) >> 23;  // sqrt(1/2) <= mantissa < sqrt(2)
  const Float f = L::as_float(bits - ((Bits)exponent << 23)) - 1.0f;
  const Float e = L::to_float(exponent), f2 = f * f;
  Float p = f * 0.08700437843799591f + -0.14267492294311523f;
  p = p * f + 0.14914770424365997f;
  p = p * f + -0.1657758355140686f;
  p = p * f + 0.19963063299655914f;
  p = p * f + -0.2500133812427521f;
  p = p * f + 0.3333390951156616f;
  Float tail = (f2 * f) * p;
  tail = tail - 0.5f * f2;
  tail = tail + e * -2.12194440e-4f;
  return (f + tail) + e * 0.693359375f;
}

// sin and cos of 2 pi w / 2^32: the remainder from the nearest quadrant, then a rotation by swap and signs.
template <class L>
FASTFLOW_FN void sincos_poly(typename L::Bits w, typename L::Float& sin, typename L::Float& cos) {
  using Float = typename L::Float;
  using Bits = typename L::Bits;
  const Bits turned = w + (1u << 29);  // quadrant = top two bits
  const auto remainder = L::as_int((turned & 0x3FFFFFFFu) >> 6) - (1 << 23);
  const Float x = (L::to_float(remainder) + 0.5f) * 0x1.921fb6p-24f;  // 2 pi / 2^26
  const Float z = x * x;
  Float s = z * -0.00019515282474458218f + 0.00833216030150652f;
  s = s * z + -0.16666655242443085f;
  s = x + (x * z) * s;
  Float c = z * 2.4438451873720624e-05f + -0.001388736767694354f;
  c = c * z + 0.04166664555668831f;
  c = (1.0f - 0.5f * z) + (z * z) * c;
  const auto odd = (turned & (1u << 30)) != 0;
  sin = L::as_float(L::as_bits(odd ? c : s) ^ (turned & 0x80000000u));
  cos = L::as_float(L::as_bits(odd ? s : c) ^ ((turned + (1u << 30)) & 0x80000000u));
}

template <class L>
FASTFLOW_FN void box_muller(typename L::Bits w0, typename L::Bits w1, typename L::Float& first,
                            typename L::Float& second) {
  using Float = typename L::Float;
  const Float u = L::to_float(L::as_int((w0 >> 8) + 1u)) * 0x1p-24f;
  const Float r = L::root(log_poly<L>(u) * -2.0f);
  Float sin, cos;
  sincos_poly<L>(w1, sin, cos);
  first = r * cos;
  second = r * sin;
}

}  // namespace fastflow
