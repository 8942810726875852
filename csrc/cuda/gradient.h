// SPDX-License-Identifier: Apache-2.0
// Backward of log_prob, shift and drift in the velocities, closed form: the residual is formed again, nothing is kept
// from the forward.
#pragma once

#include "block.h"

namespace fastflow {

// A velocity, and what guidance makes of it before a rescale.
FASTFLOW_FN void read_combined(const Tensor& velocity, const Tensor& uncond, float scale, int64_t row, int64_t element,
                               bool whole, int left, float* v, float* guided) {
  const int dtype = velocity.dtype;
  widen<ANY>(dtype, read_quad<ANY>(dtype, row_of(velocity, row, dtype), element, whole, left), v);
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) guided[i] = v[i];
  if (!uncond) return;
  float u[4];
  widen<ANY>(dtype, read_quad<ANY>(dtype, row_of(uncond, row, dtype), element, whole, left), u);
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) guided[i] = combine(v[i], u[i], scale);
}

FASTFLOW_FN void read_guided(const Call& call, const RowScalars& s, int64_t row, int64_t element, bool whole, int left,
                             float* v, float* guided) {
  read_combined(call.velocity, call.uncond, s.scale, source_row(call, row), element, whole, left, v, guided);
}

FASTFLOW_FN void rescale_quad(const Call& call, const float* factors, int64_t row, int64_t element, int left, float* v,
                              float* factor) {
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
    if (i < left) {
      factor[i] = factors[group_of(call, row, element + i)];
      v[i] = v[i] * factor[i];
    }
}

// The reference network's velocity, guided and rescaled as the velocity is.
FASTFLOW_FN void read_reference(const Call& call, const RowScalars& s, int64_t row, int64_t element, bool whole,
                                int left, float* guided) {
  float v[4], factor[4];
  read_combined(call.ref_velocity, call.ref_uncond, s.scale, row, element, whole, left, v, guided);
  if (call.ref_factors) rescale_quad(call, call.ref_factors, row, element, left, guided, factor);
}

FASTFLOW_FN void read_values(const Tensor& t, int64_t row, int64_t element, bool whole, int left, float* values) {
  widen<ANY>(t.dtype, read_quad<ANY>(t.dtype, row_of(t, row, t.dtype), element, whole, left), values);
}

// Reads a quad of sample and makes the mean of it.
FASTFLOW_FN void read_mean(const Call& call, const RowScalars& s, int64_t row, int64_t element, bool whole, int left,
                           const float* v, float* mean) {
  read_values(call.sample, source_row(call, row), element, whole, left, mean);
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) mean[i] = affine(s.a, mean[i], s.b, v[i]);
}

FASTFLOW_FN void drop_unscored(const Call& call, int64_t row, int64_t element, bool whole, int left, float* values) {
  const uint32_t kept = call.mask ? read_mask(mask_of(call.mask, row, element), whole, left) : 0x01010101u;
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
    if ((kept >> (8 * i) & 0xFFu) == 0 || i >= left) values[i] = 0.0f;
}

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
FASTFLOW_FN void read_gradient(const Call& call, const RowScalars& s, const RowSlopes& slopes, int64_t row,
                               int64_t element, bool whole, int left, const float* guided, float* factor,
                               float* gradient) {
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) factor[i] = 1.0f, gradient[i] = 0.0f;
  const bool scored = s.w != 0.0f;
  if (!scored && !call.grad_shift && !call.grad_drift) return;
  float v[4], mean[4], other[4];
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) v[i] = guided[i];
  if (call.factors) rescale_quad(call, call.factors, row, element, left, v, factor);
  read_mean(call, s, row, element, whole, left, v, mean);
  if (scored) {
    float slope[4];
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) slope[i] = slopes.score;
    if (call.reduce == NONE) {
      widen<FLOAT32>(FLOAT32, read_as<FLOAT32>(row_of(call.grad, row, FLOAT32), element, whole, left), slope);
      FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) slope[i] = score_slope(slope[i], s.w, s.b);
    }
    read_values(call.given, row, element, whole, left, other);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) gradient[i] = slope[i] * (other[i] - mean[i]);
  }
  if (call.grad_shift) {
    read_reference(call, s, row, element, whole, left, other);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) gradient[i] = gradient[i] + slopes.shift * (v[i] - other[i]);
  }
  if (call.grad_drift) {
    read_values(call.old_mean, row, element, whole, left, other);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) gradient[i] = gradient[i] + slopes.drift * (mean[i] - other[i]);
  }
  drop_unscored(call, row, element, whole, left, gradient);
}

struct Gradient {
  static constexpr int PHASES = 1, FIRST_OF_ONE_WARP = PHASES, BLOCKS = 4;
  struct Shared {};
  FASTFLOW_FN bool ends(const Call&) { return true; }
  FASTFLOW_FN int64_t rounds(const Call&, uint32_t) { return 1; }

  template <int PHASE>
  FASTFLOW_FN void phase(const Call& call, uint32_t block, int thread, int64_t, Shared&) {
    const Place at = place_of<true>(call.geometry, block, thread);
    if (at.row >= call.batch) return;
    const RowScalars s(call, at.row);
    const RowSlopes slopes = slopes_of(call, s, at.row);
    for (int i = 0; i < at.tiles; ++i)
      FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) {
        const int64_t element = (at.tile + i) * TILE + 4 * (h * at.team + at.lane);
        const int left = quad_left(call.numel, element);
        if (left) quad(call, s, slopes, at.row, element, left >= call.quad, left);
      }
  }

 private:
  FASTFLOW_FN void quad(const Call& call, const RowScalars& s, const RowSlopes& slopes, int64_t row, int64_t element,
                        bool whole, int left) {
    float v[4], guided[4], factor[4], gradient[4];
    read_guided(call, s, row, element, whole, left, v, guided);
    read_gradient(call, s, slopes, row, element, whole, left, guided, factor, gradient);
    if (!call.uncond) return write(call.grad_velocity, row, element, whole, left, gradient);
    float in_velocity[4];
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) {
      if (call.factors && i < left) {
        const int64_t group = group_of(call, row, element + i);
        gradient[i] = factor[i] * (gradient[i] - guided[i] * call.on_guided[group]);
        in_velocity[i] = s.scale * gradient[i] + v[i] * call.on_velocity[group];
      } else {
        in_velocity[i] = s.scale * gradient[i];
      }
      gradient[i] = gradient[i] - s.scale * gradient[i];
    }
    write(call.grad_velocity, row, element, whole, left, in_velocity);
    if (call.grad_uncond) write(call.grad_uncond, row, element, whole, left, gradient);
  }

  FASTFLOW_FN void write(const Tensor& t, int64_t row, int64_t element, bool whole, int left, const float* values) {
    write_quad(t.dtype, row_of(t, row, t.dtype), element, whole, left, values);
  }
};

}  // namespace fastflow
