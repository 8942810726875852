// SPDX-License-Identifier: Apache-2.0
// Backward of log_prob, shift and drift in the velocities, closed form: the residual is formed again, nothing is kept
// from the forward.
#pragma once

#include "inputs.h"

namespace fastflow {

// The part of the gradient's slopes that all elements of a row share.
struct RowSlopes {
  float score = 0.0f, shift = 0.0f, drift = 0.0f;
};

FASTFLOW_FN RowSlopes slopes_of(const Call& call, const RowScalars& s, int64_t row) {
  RowSlopes slopes;
  const float count = call.mask ? (call.counts ? call.counts[row] : 0.0f) : static_cast<float>(call.numel);
  if (call.reduce != NONE) {
    slopes.score = score_slope(float_at(call.grad, row), s.w, s.b);
    if (call.reduce == MEAN) slopes.score = slopes.score / count;
  }
  if (call.grad_shift) slopes.shift = (float_at(call.grad_shift, row) * 2.0f) / count;
  if (call.grad_drift) slopes.drift = (float_at(call.grad_drift, row) * (2.0f * s.b)) / count;
  return slopes;
}

// What reaches the rescaled velocity: slope * (given - mean), and what comes through shift and drift. Also the factor
// of each element. 0 and 1 where there is no gradient.
template <int SAMPLE, int VELOCITY>
FASTFLOW_FN void make_gradient(const Call& call, const Inputs<SAMPLE, VELOCITY, GRADIENT>& in, int h,
                               const RowScalars& s, const RowSlopes& slopes, const float* guided, float* factor,
                               float* gradient) {
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) factor[i] = 1.0f, gradient[i] = 0.0f;
  const bool scored = s.w != 0.0f;
  if (!scored && !in.shifted(call) && !in.drifted(call)) return;
  float v[4], mean[4], other[4];
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) v[i] = guided[i];
  if (in.rescaled(call)) in.rescale(call, call.factors, h, v, factor);
  in.make_mean(call, s, h, v, mean);
  if (scored) {
    float slope[4];
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) slope[i] = slopes.score;
    if (in.graded(call)) {
      widen<FLOAT32>(FLOAT32, in.grad[h], slope);
      FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) slope[i] = score_slope(slope[i], s.w, s.b);
    }
    widen<SAMPLE>(call.given.dtype, in.given[h], other);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) gradient[i] = slope[i] * (other[i] - mean[i]);
  }
  if (in.shifted(call)) {
    in.guide_reference(call, s, h, other);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) gradient[i] = gradient[i] + slopes.shift * (v[i] - other[i]);
  }
  if (in.drifted(call)) {
    widen<SAMPLE>(call.old_mean.dtype, in.old[h], other);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) gradient[i] = gradient[i] + slopes.drift * (mean[i] - other[i]);
  }
  in.drop_unscored(h, gradient);
}

// The gradient of one tile per block, or of several short rows. SAMPLE, VELOCITY: as of Inputs, for rows that are not
// short.
template <int SAMPLE, int VELOCITY>
struct Gradient {
  static constexpr int PHASES = 1, FIRST_OF_ONE_WARP = PHASES;
  static constexpr int BLOCKS = SAMPLE == ANY ? 2 : VELOCITY == FLOAT32 ? 3 : 4;
  struct Shared {};
  FASTFLOW_FN bool ends(const Call&) { return true; }
  FASTFLOW_FN int64_t rounds(const Call&, uint32_t) { return 1; }

  template <int PHASE>
  FASTFLOW_FN void phase(const Call& call, uint32_t block, int thread, int64_t, Shared&) {
    const Place at = place_of<SAMPLE == ANY>(call.geometry, block, thread);
    if (SAMPLE == ANY && at.row >= call.batch) return;
    In in(call, at.row);
    in.read(call, at.tile * TILE, at.lane, at.team);
    const RowScalars s(call, at.row);
    const RowSlopes slopes = slopes_of(call, s, at.row);
    in.wait();
    FASTFLOW_UNROLL for (int h = 0; h < 2; ++h)
      if (in.left[h]) quad(call, in, h, s, slopes);
  }

 private:
  using In = Inputs<SAMPLE, VELOCITY, GRADIENT>;

  FASTFLOW_FN void quad(const Call& call, const In& in, int h, const RowScalars& s, const RowSlopes& slopes) {
    float v[4], guided[4], factor[4], gradient[4];
    in.guide(call, s, h, v, guided);
    make_gradient(call, in, h, s, slopes, guided, factor, gradient);
    if (!call.uncond) return write(call, call.grad_velocity, in, h, gradient);
    float in_velocity[4];
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) {
      if (in.rescaled(call) && i < in.left[h]) {
        const int64_t group = group_of(call, in.row, in.first + in.at[h] + i);
        gradient[i] = factor[i] * (gradient[i] - guided[i] * call.on_guided[group]);
        in_velocity[i] = s.scale * gradient[i] + v[i] * call.on_velocity[group];
      } else {
        in_velocity[i] = s.scale * gradient[i];
      }
      gradient[i] = gradient[i] - s.scale * gradient[i];
    }
    write(call, call.grad_velocity, in, h, in_velocity);
    if (call.grad_uncond) write(call, call.grad_uncond, in, h, gradient);
  }

  FASTFLOW_FN void write(const Call& call, const Tensor& t, const In& in, int h, const float* values) {
    const int dtype = VELOCITY == ANY ? t.dtype : VELOCITY, left = in.left[h];
    write_quad(dtype, row_of(t, in.row, dtype, in.first), in.at[h], left >= call.quad, left, values);
  }
};

}  // namespace fastflow
