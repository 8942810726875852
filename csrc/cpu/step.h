// SPDX-License-Identifier: Apache-2.0
// The forward step: work is cut into tiles of 2,048 elements over all rows, each tile leaves one partial sum, and the
// partial sums of a row are added in order afterwards.
#pragma once

#include "block.h"
#include "parallel.h"
#include "rescale.h"

namespace fastflow::FASTFLOW_ISA {

struct Partial {
  float sum, shift, drift;
  int32_t count;  // elements that are scored
  int32_t bad;    // not finite
};

// Inputs are asked for this far ahead: hardware prefetch stops at each 4 KB page.
constexpr int64_t AHEAD = 2 * BLOCK;

// Calls that write at least this much float32 write it past the cache, which would only pass it on.
constexpr int64_t STREAM_BYTES = 4 << 20;

class Step {
 public:
  Step(const Call& call, const Factors& factors, const Call& reference, const Factors& reference_factors,
       Partial* partials)
      : call_(call),
        factors_(factors),
        reference_(reference),
        reference_factors_(reference_factors),
        partials_(partials),
        tiles_((call.numel + TILE - 1) / TILE) {
    wants_next_ = call.next_sample || call.log_prob || call.flags;
    wants_mean_ = wants_next_ || call.mean || call.drift;
    const Tensor* outputs[] = {&call.next_sample, &call.clean, &call.ode_next, &call.mean};
    int64_t written = 0;
    for (const Tensor* t : outputs)
      if (*t && t->dtype == FLOAT32) written += call.batch * call.numel * 4;
    past_ = written >= STREAM_BYTES;
    // what the next sample is rounded to before it is scored: a replayed one is scored as stored
    scored_dtype_ = call.given || !call.score_rounded ? static_cast<int>(FLOAT32) : call.next_dtype;
  }

  void tile(int64_t index) const {
    const int64_t row = index / tiles_, first = index % tiles_ * TILE;
    const int n = static_cast<int>(call_.numel - first < TILE ? call_.numel - first : TILE);
    const RowScalars s(call_, row);
    Float square[TILE / LANES], shift[TILE / LANES], drift[TILE / LANES];
    Partial partial{0.0f, 0.0f, 0.0f, n, 0};
    const bool sums = call_.log_prob && call_.reduce != NONE && s.w != 0.0f;
    for (int at = 0; at < n; at += BLOCK) {
      const int m = n - at < BLOCK ? n - at : BLOCK;
      block(s, row, first + at, m, square + at / LANES, shift + at / LANES, drift + at / LANES, partial);
    }
    if (sums) {
      clear_tail(square, n);
      partial.sum = fold(square, n);
    }
    if (call_.shift) partial.shift = sum_tile(shift, n);
    if (call_.drift) partial.drift = sum_tile(drift, n);
    if (call_.mask && ((call_.log_prob && call_.reduce != NONE) || call_.shift || call_.drift))
      partial.count = count_mask(call_.mask, row, first, n);
    partials_[index] = partial;
    if (past_) Vector::stream_fence();
  }

  void finish_row(int64_t row) const {
    const RowScalars s(call_, row);
    float sum = 0.0f, shift = 0.0f, drift = 0.0f;
    int64_t count = 0;
    int bad = 0;
    for (int64_t t = 0; t < tiles_; ++t) {
      const Partial& partial = partials_[row * tiles_ + t];
      sum = t ? sum + partial.sum : partial.sum;
      shift = t ? shift + partial.shift : partial.shift;
      drift = t ? drift + partial.drift : partial.drift;
      count += partial.count;
      bad |= partial.bad;
    }
    if (call_.log_prob && call_.reduce != NONE)
      reinterpret_cast<float*>(call_.log_prob.data)[row * call_.log_prob.stride] =
          score_row(call_.reduce, s.c0, s.w, sum, static_cast<float>(count));
    if (call_.flags) reinterpret_cast<int32_t*>(call_.flags.data)[row * call_.flags.stride] = flags_of(call_, row, bad);
    write_mean(call_.shift, row, shift, count);
    write_mean(call_.drift, row, drift, count);
  }

 private:
  static void write_mean(const Tensor& slot, int64_t row, float sum, int64_t count) {
    if (slot)
      reinterpret_cast<float*>(slot.data)[row * slot.stride] = count ? sum / static_cast<float>(count) : 0.0f;
  }

  static float sum_tile(Float* values, int n) {
    clear_tail(values, n);
    return fold(values, n);
  }

  // values = (a - b)^2, 0 where masked.
  void difference(Float* values, int64_t row, int64_t first, int n, const Float* a, const Float* b) const {
    for (int k = 0; k * LANES < n; ++k) {
      const Float d = a[k] - b[k];
      values[k] = d * d;
    }
    if (call_.mask) apply_mask(values, call_.mask, row, first, n);
  }

  void block(const RowScalars& s, int64_t row, int64_t first, int n, Float* square, Float* shift, Float* drift,
             Partial& partial) const {
    Float x[VECTORS], v[VECTORS], mean[VECTORS], next[VECTORS];
    const int vectors = (n + LANES - 1) / LANES;
    const int64_t source = source_row(call_, row);
    for (const Tensor* t : {&call_.sample, &call_.velocity, &call_.uncond}) prefetch(*t, source, first + AHEAD);
    for (const Tensor* t : {&call_.noise, &call_.given, &call_.ref_velocity, &call_.ref_uncond, &call_.old_mean})
      prefetch(*t, row, first + AHEAD);
    read(x, call_.sample, source, first, n);
    read_combined(v, call_, s.scale, row, first, n);
    factors_.apply(v, row, first, n);
    if (wants_mean_)
      for (int k = 0; k < vectors; ++k) mean[k] = affine(s.a, x[k], s.b, v[k]);
    if (wants_next_) {
      const Float* value = next_values(s, row, first, n, mean, next);
      if (call_.flags) partial.bad |= !all_finite(value, vectors * LANES) || !all_finite(mean, vectors * LANES);
      if (call_.log_prob) score(s, row, first, n, value, mean, square);
      if (call_.next_sample) write(call_.next_sample, row, first, n, value, past_);
    }
    if (call_.shift) {
      read_combined(next, reference_, s.scale, row, first, n);
      reference_factors_.apply(next, row, first, n);
      difference(shift, row, first, n, v, next);
    }
    if (call_.drift) {
      read(next, call_.old_mean, row, first, n);
      difference(drift, row, first, n, mean, next);
    }
    if (call_.mean) write(call_.mean, row, first, n, mean, past_);
    if (call_.clean) write_affine(call_.clean, row, first, n, s.p, x, s.q, v, past_);
    if (call_.ode_next) write_affine(call_.ode_next, row, first, n, s.ode_a, x, s.ode_b, v, past_);
  }

  const Float* next_values(const RowScalars& s, int64_t row, int64_t first, int n, const Float* mean,
                           Float* next) const {
    if (call_.given) {
      read(next, call_.given, row, first, n);
      return next;
    }
    if (s.std == 0.0f || !(call_.noise || call_.seeds)) return mean;
    if (call_.noise)
      read(next, call_.noise, row, first, n);
    else
      draw(next, n, static_cast<uint64_t>(call_.offset + first) / 4, philox_key(int64_at(call_.seeds, row)),
           static_cast<uint32_t>(int64_at(call_.step, row)), call_.stream);
    for (int k = 0; k * LANES < n; ++k) next[k] = draw_next(mean[k], s.std, next[k]);
    return next;
  }

  void score(const RowScalars& s, int64_t row, int64_t first, int n, const Float* next, const Float* mean,
             Float* square) const {
    if (s.w != 0.0f)
      squares(square, scored_dtype_, next, mean, n);
    else if (call_.reduce != NONE)
      return;
    if (call_.reduce == NONE) {
      for (int k = 0; k * LANES < n; ++k)
        square[k] = s.w == 0.0f ? Float{} + s.c0 : score_element(s.c0, s.w, square[k]);
    }
    if (call_.mask) apply_mask(square, call_.mask, row, first, n);
    if (call_.reduce == NONE) write(call_.log_prob, row, first, n, square);
  }

  const Call& call_;
  const Factors& factors_;
  const Call& reference_;
  const Factors& reference_factors_;
  Partial* partials_;
  int64_t tiles_;
  int scored_dtype_;
  bool wants_next_, wants_mean_, past_;
};

static void step(const Call& call) {
  const int64_t tiles = (call.numel + TILE - 1) / TILE;
  const Scratch partials(call.batch * tiles * sizeof(Partial));
  const Factors factors(call);
  const Call reference = reference_of(call);
  const Factors reference_factors(reference);
  const Step step(call, factors, reference, reference_factors, static_cast<Partial*>(partials.data()));
  parallel(call.batch * tiles, call.numel < TILE ? call.numel : TILE, call.threads, [&](int64_t i) { step.tile(i); });
  if (call.flags || call.shift || call.drift || (call.log_prob && call.reduce != NONE))
    for (int64_t row = 0; row < call.batch; ++row) step.finish_row(row);
}

}  // namespace fastflow::FASTFLOW_ISA
