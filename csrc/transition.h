// SPDX-License-Identifier: Apache-2.0
// The formulas of a transition. F is a float or a vector of floats. Every product and every sum rounds on its own.
#pragma once

#include "lane.h"

namespace fastflow {

// Columns of the coefficient table: fastflow/dynamics/columns.py.
enum Column { A, B, STD, P, Q, ODE_A, ODE_B, SIGMA, SIGMA_NEXT, C0, W, HISTORY, TIMESTEP, COLUMNS = 16 };
enum Score { GAUSSIAN, GAUSSIAN_NO_CONST, SQUARE };
enum Reduce { MEAN, SUM, NONE };
enum Rescale { RESCALE_NONE, RESCALE_TOKEN, RESCALE_CLAMP };

template <class F>
FASTFLOW_FN F combine(F velocity, F uncond, float scale) {
  return uncond + scale * (velocity - uncond);
}

template <class F>
FASTFLOW_FN F affine(float on_sample, F sample, float on_velocity, F velocity) {
  return on_sample * sample + on_velocity * velocity;
}

template <class F>
FASTFLOW_FN F draw_next(F mean, float std, F z) {
  return mean + std * z;
}

// log-probability of one element (reduce none), of a mean over n elements, of a sum over n elements.
template <class F>
FASTFLOW_FN F score_element(float c0, float w, F square) {
  return c0 - w * square;
}
FASTFLOW_FN float score_row(int reduce, float c0, float w, float sum, float n) {
  if (n == 0.0f) return 0.0f;
  const float constant = reduce == MEAN ? c0 : n * c0;
  if (w == 0.0f) return constant;
  return constant - w * (reduce == MEAN ? sum / n : sum);
}

// d log_prob / d mean is slope * (next - mean), `grad` being the gradient in the row's (or element's) log_prob. The
// same with a factor b: d log_prob / d velocity.
template <class F>
FASTFLOW_FN F score_slope(F grad, float w, float b) {
  return grad * ((2.0f * w) * b);
}

// Rescale of a guided velocity to the norm of the conditional one. Arguments are sums of squares over the group.
struct RescaleFactor {
  float factor;
  bool rescaled;  // false: the factor is the constant 1
};
FASTFLOW_FN RescaleFactor rescale_factor(int rescale, float square, float guided_square) {
  const float norm = Scalar::root(square), guided_norm = Scalar::root(guided_square);
  const bool kept = rescale == RESCALE_TOKEN ? guided_norm == 0.0f : !(guided_norm > norm);
  return {kept ? 1.0f : norm / guided_norm, !kept};
}

// Gradient through guided * factor: inner = factor * (grad - guided * on_guided) reaches the guided velocity, and
// velocity * on_velocity is added to the gradient in the velocity. dot = sum of grad * guided over the group.
struct RescaleSlopes {
  float factor, on_guided, on_velocity;
};
FASTFLOW_FN RescaleSlopes rescale_slopes(RescaleFactor f, float square, float guided_square, float dot) {
  if (!f.rescaled) return {1.0f, 0.0f, 0.0f};
  const float norms = Scalar::root(guided_square) * Scalar::root(square);
  return {f.factor, dot / guided_square, norms > 0.0f ? dot / norms : 0.0f};
}

}  // namespace fastflow
