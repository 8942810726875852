// SPDX-License-Identifier: Apache-2.0
// What a flow-matching loss makes of the errors of a velocity. F is a float or a vector of floats. See
// fastflow/ops/matching.py for what each mean is.
#pragma once

#include "lane.h"

namespace fastflow {

enum Mean { SQUARE_MEAN, OLD_MEAN, CROSS_MEAN, PLUS_MEAN, MINUS_MEAN, SHIFT_MEAN, MEAN_COUNT };
enum MeanGradient { ON_SQUARE, ON_CROSS, ON_SHIFT };

template <class F>
FASTFLOW_FN F magnitude(F x) {
  return x < 0.0f ? -x : x;
}
template <class F>
FASTFLOW_FN F plus_error(float beta, F own, F old) {
  return magnitude(beta * own + (1.0f - beta) * old);
}
template <class F>
FASTFLOW_FN F minus_error(float beta, F own, F old) {
  return magnitude((1.0f + beta) * old - beta * own);
}

// The gradient in the velocity.
struct MatchingSlopes {
  float own, old, shift;
};
// grad: of the loss in the row's means of MeanGradient, `stride` apart; `count` of its elements are scored.
FASTFLOW_FN MatchingSlopes matching_slopes(const float* grad, int64_t stride, float count) {
  return {(grad[ON_SQUARE * stride] * 2.0f) / count, grad[ON_CROSS * stride] / count,
          (grad[ON_SHIFT * stride] * 2.0f) / count};
}
template <class F>
FASTFLOW_FN F matching_gradient(const MatchingSlopes& on, F own, F old, F shift) {
  return on.own * own + on.old * old + on.shift * shift;
}

}  // namespace fastflow
