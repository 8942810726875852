// SPDX-License-Identifier: Apache-2.0
// Backward of log_prob in the velocities, closed form: the residual is formed again, nothing is kept from the forward.
#pragma once

#include "rescale.h"

namespace fastflow::FASTFLOW_ISA {

class Backward {
 public:
  Backward(const Call& call, const Factors& factors, const Call& reference, const Factors& reference_factors,
           const float* counts, float* on_guided, float* on_velocity)
      : call_(call),
        factors_(factors),
        reference_(reference),
        reference_factors_(reference_factors),
        counts_(counts),
        on_guided_(on_guided),
        on_velocity_(on_velocity) {}

  // The slopes of every rescaled group.
  void sum_groups() const {
    const auto values = [&](int64_t row, int64_t first, int n, Terms<3>& out) {
      Float factor[VECTORS];
      read(out.of[0], call_.velocity, row, first, n);
      scaled_gradient(RowScalars(call_, row), row, first, n, out.of[1], factor, out.of[2]);
      for (int i = 0; i * LANES < n; ++i) {
        out.of[2][i] = out.of[2][i] * out.of[1][i];
        out.of[1][i] = out.of[1][i] * out.of[1][i];
        out.of[0][i] = out.of[0][i] * out.of[0][i];
      }
    };
    factors_.groups().sum<3>(values, [&](int64_t group, const float (&sums)[3]) {
      const RescaleFactor factor = rescale_factor(call_.rescale, sums[0], sums[1]);
      const RescaleSlopes slopes = rescale_slopes(factor, sums[0], sums[1], sums[2]);
      on_guided_[group] = slopes.on_guided;
      on_velocity_[group] = slopes.on_velocity;
    });
  }

  void block(int64_t row, int64_t first, int n) const {
    const RowScalars s(call_, row);
    Float guided[VECTORS], factor[VECTORS], gradient[VECTORS];
    scaled_gradient(s, row, first, n, guided, factor, gradient);
    if (!call_.uncond) return write(call_.grad_velocity, row, first, n, gradient);
    const int vectors = (n + LANES - 1) / LANES;
    Float in_velocity[VECTORS];
    if (factors_.groups().active) {
      Float v[VECTORS], on_guided[VECTORS], on_velocity[VECTORS];
      read(v, call_.velocity, row, first, n);
      factors_.groups().expand(on_guided_, row, first, n, on_guided);
      factors_.groups().expand(on_velocity_, row, first, n, on_velocity);
      for (int k = 0; k < vectors; ++k) {
        gradient[k] = factor[k] * (gradient[k] - guided[k] * on_guided[k]);
        in_velocity[k] = s.scale * gradient[k] + v[k] * on_velocity[k];
      }
    } else {
      for (int k = 0; k < vectors; ++k) in_velocity[k] = s.scale * gradient[k];
    }
    write(call_.grad_velocity, row, first, n, in_velocity);
    if (!call_.grad_uncond) return;
    for (int k = 0; k < vectors; ++k) gradient[k] = gradient[k] - s.scale * gradient[k];
    write(call_.grad_uncond, row, first, n, gradient);
  }

 private:
  // What reaches the (rescaled) velocity: slope * (given - mean), and what comes through shift and drift. Also the guided
  // velocity before its rescale.
  void scaled_gradient(const RowScalars& s, int64_t row, int64_t first, int n, Float* guided, Float* factor,
                       Float* gradient) const {
    Float x[VECTORS], v[VECTORS], other[VECTORS];
    const int vectors = (n + LANES - 1) / LANES;
    const bool scored = s.w != 0.0f;
    read_combined(guided, call_, s.scale, row, first, n);
    if (!scored && !call_.grad_shift && !call_.grad_drift) {
      for (int k = 0; k < vectors; ++k) gradient[k] = Float{}, factor[k] = Float{} + 1.0f;
      return;
    }
    for (int k = 0; k < vectors; ++k) v[k] = guided[k], factor[k] = Float{} + 1.0f;
    factors_.apply(v, row, first, n, factor);
    read(x, call_.sample, row, first, n);
    if (scored) {
      read(other, call_.given, row, first, n);
      slopes(s, row, first, n, gradient);
      for (int k = 0; k < vectors; ++k) gradient[k] = gradient[k] * (other[k] - affine(s.a, x[k], s.b, v[k]));
    } else {
      for (int k = 0; k < vectors; ++k) gradient[k] = Float{};
    }
    if (call_.grad_shift) {
      const float slope = (float_at(call_.grad_shift, row) * 2.0f) / counts_[row];
      read_combined(other, reference_, s.scale, row, first, n);
      reference_factors_.apply(other, row, first, n);
      for (int k = 0; k < vectors; ++k) gradient[k] = gradient[k] + slope * (v[k] - other[k]);
    }
    if (call_.grad_drift) {
      const float slope = (float_at(call_.grad_drift, row) * (2.0f * s.b)) / counts_[row];
      read(other, call_.old_mean, row, first, n);
      for (int k = 0; k < vectors; ++k) gradient[k] = gradient[k] + slope * (affine(s.a, x[k], s.b, v[k]) - other[k]);
    }
    if (call_.mask) apply_mask(gradient, call_.mask, row, first, n);
    clear_tail(gradient, n);
  }

  // d log_prob / d velocity is this times (given - mean).
  void slopes(const RowScalars& s, int64_t row, int64_t first, int n, Float* slope) const {
    if (call_.reduce == NONE) {
      read(slope, call_.grad, row, first, n);
      for (int k = 0; k * LANES < n; ++k) slope[k] = score_slope(slope[k], s.w, s.b);
      return;
    }
    float one = score_slope(float_at(call_.grad, row), s.w, s.b);
    if (call_.reduce == MEAN) one = one / counts_[row];
    for (int k = 0; k * LANES < n; ++k) slope[k] = Float{} + one;
  }

  const Call& call_;
  const Factors& factors_;
  const Call& reference_;
  const Factors& reference_factors_;
  const float* counts_;
  float *on_guided_, *on_velocity_;
};

static void log_prob_backward(const Call& call) {
  const Factors factors(call);
  const Call reference = reference_of(call);
  const Factors reference_factors(reference);
  const int64_t groups = factors.groups().active ? call.batch * factors.groups().per_row : 0;
  const Scratch scratch((call.batch + 2 * groups) * sizeof(float));
  float* counts = static_cast<float*>(scratch.data());
  parallel(call.batch, call.numel, call.threads, [&](int64_t row) {
    int64_t count = call.mask ? 0 : call.numel;
    for (int64_t first = 0; call.mask && first < call.numel; first += TILE) {
      const int64_t left = call.numel - first;
      count += count_mask(call.mask, row, first, static_cast<int>(left < TILE ? left : TILE));
    }
    counts[row] = static_cast<float>(count);
  });
  const Backward backward(call, factors, reference, reference_factors, counts, counts + call.batch,
                          counts + call.batch + groups);
  if (groups) backward.sum_groups();
  const int64_t blocks = (call.numel + BLOCK - 1) / BLOCK;
  parallel(call.batch * blocks, BLOCK, call.threads, [&](int64_t i) {
    const int64_t first = i % blocks * BLOCK, left = call.numel - first;
    backward.block(i / blocks, first, static_cast<int>(left < BLOCK ? left : BLOCK));
  });
}

}  // namespace fastflow::FASTFLOW_ISA
