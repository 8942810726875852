// SPDX-License-Identifier: Apache-2.0
// What the gradient and the sums over rows read of a tile. A thread has two quads of each input, as they lie in memory,
// so that all are on their way before one is waited for.
#pragma once

#include "block.h"

namespace fastflow {

// What is made of them: squares of the velocities, the gradient in them, or what shift, drift and a replay's score are
// the means of.
enum Purpose { SQUARES, GRADIENT, DIFFERENCES };

// SAMPLE, VELOCITY: dtypes, that of given and old_mean and that of the reference network too, where no velocity is
// rescaled, grad is a number per row and no gradient comes through drift; ANY for all other calls.
template <int SAMPLE, int VELOCITY, int PURPOSE>
struct Inputs {
  int64_t row, source, first;  // where the tile starts in the row
  int at[2], left[2];          // of each quad, from there, and what the row has of it
  Quad v[2], u[2], x[2], given[2], ref_v[2], ref_u[2], old[2], grad[2];
  uint32_t kept[2];

  FASTFLOW_METHOD Inputs(const Call& call, int64_t row_) : row(row_), source(source_row(call, row_)) {}

  FASTFLOW_METHOD static bool shifted(const Call& call) {
    return PURPOSE == GRADIENT ? static_cast<bool>(call.grad_shift) : PURPOSE == DIFFERENCES && call.shift;
  }
  FASTFLOW_METHOD static bool drifted(const Call& call) {
    return PURPOSE == GRADIENT ? SAMPLE == ANY && call.grad_drift : PURPOSE == DIFFERENCES && call.drift;
  }
  FASTFLOW_METHOD static bool replayed(const Call& call) {
    return PURPOSE == GRADIENT || (PURPOSE == DIFFERENCES && call.compared);
  }
  FASTFLOW_METHOD static bool graded(const Call& call) {  // each element has a gradient of its own
    return PURPOSE == GRADIENT && SAMPLE == ANY && call.reduce == NONE;
  }
  FASTFLOW_METHOD static bool rescaled(const Call& call) { return SAMPLE == ANY && call.factors; }

  // The quads at `lane` and `team` further.
  FASTFLOW_METHOD void read(const Call& call, int64_t first_, int lane, int team) {
    first = first_;
    FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) {
      at[h] = 4 * (h * team + lane);
      left[h] = quad_left(call.numel, first + at[h]);
    }
    if (left[1] >= call.quad)
      read_all(call, true);
    else
      read_all(call, false);
  }

  // One element alone.
  FASTFLOW_METHOD void read_one(const Call& call, int64_t element) {
    first = element, at[0] = at[1] = 0, left[0] = 1, left[1] = 0;
    read_all(call, false);
  }

  // Nothing is made of the quads before this.
  FASTFLOW_METHOD void wait() {
    hold_pair<VELOCITY>(v);
    hold_pair<VELOCITY>(u);
    if (PURPOSE == SQUARES) return;
    hold_pair<SAMPLE>(x);
    hold_pair<SAMPLE>(given);
    hold_pair<VELOCITY>(ref_v);
    hold_pair<VELOCITY>(ref_u);
    hold_pair<SAMPLE>(old);
  }

  // The velocity, and what guidance makes of it before a rescale.
  FASTFLOW_METHOD void guide(const Call& call, const RowScalars& s, int h, float* own, float* guided) const {
    combine_quads(call.velocity, v[h], call.uncond, u[h], s.scale, own, guided);
  }

  // The reference network's velocity, guided and rescaled as the velocity is.
  FASTFLOW_METHOD void guide_reference(const Call& call, const RowScalars& s, int h, float* guided) const {
    float own[4], factor[4];
    combine_quads(call.ref_velocity, ref_v[h], call.ref_uncond, ref_u[h], s.scale, own, guided);
    if (rescaled(call) && call.ref_factors) rescale(call, call.ref_factors, h, guided, factor);
  }

  FASTFLOW_METHOD void rescale(const Call& call, const float* factors, int h, float* values, float* factor) const {
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
      if (i < left[h]) {
        factor[i] = factors[group_of(call, row, first + at[h] + i)];
        values[i] = values[i] * factor[i];
      }
  }

  FASTFLOW_METHOD void make_mean(const Call& call, const RowScalars& s, int h, const float* guided, float* mean) const {
    widen<SAMPLE>(call.sample.dtype, x[h], mean);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) mean[i] = affine(s.a, mean[i], s.b, guided[i]);
  }

  FASTFLOW_METHOD void drop_unscored(int h, float* values) const {
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
      if ((kept[h] >> (8 * i) & 0xFFu) == 0 || i >= left[h]) values[i] = 0.0f;
  }

 private:
  FASTFLOW_METHOD void read_all(const Call& call, bool whole) {
    read_pair<VELOCITY>(call.velocity, source, first, at, whole, left, v);
    if (call.uncond) read_pair<VELOCITY>(call.uncond, source, first, at, whole, left, u);
    if (replayed(call) || drifted(call)) read_pair<SAMPLE>(call.sample, source, first, at, whole, left, x);
    if (replayed(call)) read_pair<SAMPLE>(call.given, row, first, at, whole, left, given);
    if (shifted(call)) {
      read_pair<VELOCITY>(call.ref_velocity, row, first, at, whole, left, ref_v);
      if (call.ref_uncond) read_pair<VELOCITY>(call.ref_uncond, row, first, at, whole, left, ref_u);
    }
    if (drifted(call)) read_pair<SAMPLE>(call.old_mean, row, first, at, whole, left, old);
    if (graded(call)) read_pair<FLOAT32>(call.grad, row, first, at, whole, left, grad);
    FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) {
      kept[h] = 0x01010101u;
      if (PURPOSE != SQUARES && call.mask)
        kept[h] = read_mask(mask_of(call.mask, row, first) + at[h], whole, left[h]);
    }
  }

  FASTFLOW_METHOD static void combine_quads(const Tensor& velocity, const Quad& of_velocity, const Tensor& uncond,
                                            const Quad& of_uncond, float scale, float* own, float* guided) {
    widen<VELOCITY>(velocity.dtype, of_velocity, own);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) guided[i] = own[i];
    if (!uncond) return;
    float other[4];
    widen<VELOCITY>(velocity.dtype, of_uncond, other);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) guided[i] = combine(own[i], other[i], scale);
  }
};

}  // namespace fastflow
