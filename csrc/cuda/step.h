// SPDX-License-Identifier: Apache-2.0
// The step: every output of a transition in one pass over its inputs.
#pragma once

#include "block.h"

namespace fastflow {

// SAMPLE, VELOCITY: dtypes; ANY for all others, for rows shorter than a block and for rescaled guidance. DRAWN: the
// noise is drawn from counters; otherwise it is read, or the next sample is given, or there is none. GUIDED: uncond is
// there.
template <int SAMPLE_, int VELOCITY_, bool DRAWN_, bool GUIDED_>
struct Step {
  static constexpr int SAMPLE = SAMPLE_, VELOCITY = VELOCITY_;
  static constexpr bool DRAWN = DRAWN_, GUIDED = GUIDED_, TEAMS = SAMPLE == ANY;
  static constexpr int PHASES = 4, FIRST_OF_ONE_WARP = 2;
  static constexpr int BLOCKS = TEAMS ? 2 : 4;  // resident at least, which bounds the registers

  struct Shared {
    alignas(16) float values[WHOLE_TILES * TILE / 2];
    float lanes[8][32];
    float sums[8];
    uint32_t lane_marks[8][32], sum_marks[8];
    uint8_t marks[WHOLE_TILES * THREADS];
  };

  // The part of a row that a block has.
  struct Span {
    int64_t row, first;
    int left;                    // elements from `first` on
    const char *x, *v, *u;
  };

  // What a thread has of one tile: the quads at `at` and at + 4 * team, from the span's first element on.
  struct Part {
    int at, next;
    int left;    // elements from `at` on; of the second quad, next - at fewer
    bool whole;  // both quads are there, to be read and written at once
    Quad x[2], v[2], u[2], z[2];
    uint32_t kept[2];

    FASTFLOW_METHOD int at_of(int h) const { return h ? next : at; }
    FASTFLOW_METHOD int left_of(int h) const { return h ? left - (next - at) : left; }
  };

  FASTFLOW_FN int64_t rounds(const Call&, uint32_t) { return 1; }

  // Whether nothing is left after the first phase, and how many tiles (or short rows) the block folds in the others.
  FASTFLOW_FN bool ends(const Call& call) { return !call.reduces && !call.flags; }
  FASTFLOW_FN int folds(const Call& call, const Place& at) {
    if (at.team == THREADS) return at.tiles;
    const int64_t left = call.batch - at.row + at.slot;
    return static_cast<int>(left < THREADS / at.team ? left : THREADS / at.team);
  }

  template <int PHASE>
  FASTFLOW_FN void phase(const Call& call, uint32_t block, int thread, int64_t, Shared& shared) {
    const Place at = place_of<TEAMS>(call.geometry, block, thread);
    if constexpr (PHASE == 0) {
      if (TEAMS && at.row >= call.batch) return;
      span(call, at, shared);
    } else if constexpr (PHASE == 1) {
      const int slot = thread / 32, lane = thread % 32;
      if (slot >= folds(call, at)) return;
      if (call.reduces) shared.lanes[slot][lane] = fold_lane(shared.values + slot * 4 * at.team, at.team, lane);
      if (call.marked) {
        uint32_t sum = 0;
        for (int i = lane; i < at.team; i += 32) sum = add_marks(sum, read_mark(shared.marks[slot * at.team + i]));
        shared.lane_marks[slot][lane] = sum;
      }
    } else if constexpr (PHASE == 2) {
      if (thread >= folds(call, at)) return;
      const float sum = call.reduces ? fold_lanes(shared.lanes[thread]) : 0.0f;
      uint32_t mark = 0;
      if (call.marked)
        for (int i = 0; i < 32; ++i) mark = add_marks(mark, shared.lane_marks[thread][i]);
      shared.sums[thread] = sum;
      shared.sum_marks[thread] = mark;
      if (call.geometry.spans.divisor > 1) {
        const int64_t tile = at.row * call.geometry.tiles + at.tile + thread;
        if (call.reduces) call.sums[tile] = sum;
        if (call.marked) call.marks[tile] = mark;
      }
    } else {
      if (call.geometry.spans.divisor > 1) return;
      if (at.team == THREADS) {
        if (thread > 0) return;
        float sum = shared.sums[0];
        uint32_t mark = shared.sum_marks[0];
        for (int i = 1; i < at.tiles; ++i) {
          sum = sum + shared.sums[i];
          mark = add_marks(mark, shared.sum_marks[i]);
        }
        finish_row(call, at.row, sum, mark & ~BAD, mark & BAD);
      } else if (thread < folds(call, at)) {
        const uint32_t mark = shared.sum_marks[thread];
        finish_row(call, at.row - at.slot + thread, shared.sums[thread], mark & ~BAD, mark & BAD);
      }
    }
  }

 private:
  // A thread's mark: up to 8 elements that are scored, and 128 for BAD.
  FASTFLOW_FN uint32_t read_mark(uint8_t mark) { return (mark & 15u) | static_cast<uint32_t>(mark >> 7) << 31; }

  FASTFLOW_FN void span(const Call& call, const Place& at, Shared& shared) {
    const RowScalars s(call, at.row);
    Span span;
    span.row = at.row;
    span.first = at.tile * TILE;
    const int64_t left = call.numel - span.first;
    span.left = static_cast<int>(left < at.tiles * TILE ? left : at.tiles * TILE);
    const int sample = SAMPLE == ANY ? call.sample.dtype : SAMPLE;
    const int velocity = VELOCITY == ANY ? call.velocity.dtype : VELOCITY;
    const int64_t source = source_row(call, at.row);
    span.x = row_of(call.sample, source, sample, span.first);
    span.v = row_of(call.velocity, source, velocity, span.first);
    span.u = GUIDED ? row_of(call.uncond, source, velocity, span.first) : nullptr;
    PhiloxKey key{};
    uint32_t step = 0;
    // Where std is 0 the noise is -0: mean + 0 * -0 is the mean, whatever its sign.
    const float std = s.t[STD] == 0.0f ? 0.0f : s.t[STD];
    const uint64_t quad = static_cast<uint64_t>(call.offset + span.first) / 4;
    if (DRAWN) {
      key = philox_key(int64_at(call.seeds, at.row));
      step = static_cast<uint32_t>(int64_at(call.step, at.row));
    }
    for (int i = 0; i < at.tiles; ++i) {
      Part part;
      part.at = i * TILE + 4 * at.lane;
      part.next = part.at + 4 * at.team;
      part.left = span.left - part.at;
      part.whole = part.left_of(1) >= call.quad;
      if (part.whole)
        read(call, span, true, part);
      else
        read(call, span, false, part);
      float z[ELEMENTS];
      if (DRAWN) {  // for every row: a branch around the noise would let the compiler wait for the inputs first
        FASTFLOW_UNROLL for (int h = 0; h < 2; ++h)
          draw_quad(quad + static_cast<uint32_t>(part.at_of(h)) / 4, key, step, call.stream, z + 4 * h);
        if (std == 0.0f)
          FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) z[i] = -0.0f;
      }
      FASTFLOW_UNROLL for (int h = 0; DRAWN && h < 2; ++h) {
        hold<SAMPLE>(part.x[h]);
        hold<VELOCITY>(part.v[h]);
        if (GUIDED) hold<VELOCITY>(part.u[h]);
      }
      finish_tile(call, span, s, std, part, z, i * (TILE / 2) + (at.slot * at.team + at.lane) * 4, shared);
    }
  }

  FASTFLOW_FN void read(const Call& call, const Span& span, bool whole, Part& part) {
    FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) {
      const int at = part.at_of(h), left = part.left_of(h);
      part.x[h] = read_quad<SAMPLE>(call.sample.dtype, span.x, at, whole, left);
      part.v[h] = read_quad<VELOCITY>(call.velocity.dtype, span.v, at, whole, left);
      if (GUIDED) part.u[h] = read_quad<VELOCITY>(call.velocity.dtype, span.u, at, whole, left);
      if (!DRAWN) {
        const Tensor& t = call.given ? call.given : call.noise;
        if (t) part.z[h] = read_quad<ANY>(t.dtype, row_of(t, span.row, t.dtype, span.first), at, whole, left);
      }
      if (call.mask) part.kept[h] = read_mask(mask_of(call.mask, span.row, span.first) + at, whole, left);
    }
  }

  // `to`: where the thread leaves its four sums of squares; `drawn`: its noise.
  FASTFLOW_FN void finish_tile(const Call& call, const Span& span, const RowScalars& s, float std, const Part& part,
                               const float* drawn, int to, Shared& shared) {
    float x[ELEMENTS], v[ELEMENTS], mean[ELEMENTS], next[ELEMENTS], square[ELEMENTS];
    FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) {
      widen<SAMPLE>(call.sample.dtype, part.x[h], x + 4 * h);
      widen<VELOCITY>(call.velocity.dtype, part.v[h], v + 4 * h);
      if (GUIDED) {
        float u[4];
        widen<VELOCITY>(call.velocity.dtype, part.u[h], u);
        FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) v[4 * h + i] = combine(v[4 * h + i], u[i], s.scale);
        if (TEAMS && call.factors)
          FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
            if (i < part.left_of(h)) {
              const int64_t group = group_of(call, span.row, span.first + part.at_of(h) + i);
              v[4 * h + i] = v[4 * h + i] * call.factors[group];
            }
      }
    }
    if (call.clean) write_affine(call.clean, span, part, s.t[P], x, s.t[Q], v);
    if (call.ode_next) write_affine(call.ode_next, span, part, s.t[ODE_A], x, s.t[ODE_B], v);
    FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) next[i] = mean[i] = affine(s.a, x[i], s.b, v[i]);
    if (call.mean) write(call.mean, span, part, mean);
    if (DRAWN) {
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) next[i] = draw_next(mean[i], std, drawn[i]);
    } else if (call.given || (call.noise && std != 0.0f)) {
      FASTFLOW_UNROLL for (int h = 0; h < 2; ++h)
        widen<ANY>(call.given ? call.given.dtype : call.noise.dtype, part.z[h], next + 4 * h);
      if (!call.given) FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) next[i] = draw_next(mean[i], std, next[i]);
    }
    if (call.next_sample) write(call.next_sample, span, part, next);
    if (call.marked) mark(call, part, mean, next, shared.marks[to / 4]);
    if (call.log_prob) {
      score(call, s, part, mean, next, square);
      if (call.reduce == NONE) {
        write(call.log_prob, span, part, square);
      } else {
        Words4 words;
        FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) words.at[i] = Scalar::as_bits(square[i] + square[i + 4]);
        *reinterpret_cast<Words4*>(shared.values + to) = words;
      }
    }
  }

  // The score of each element before it is summed: 0 where there is no element or the mask drops it.
  FASTFLOW_FN void score(const Call& call, const RowScalars& s, const Part& part, const float* mean, const float* next,
                         float* square) {
    const int dtype = call.given || !call.score_rounded ? static_cast<int>(FLOAT32) : call.next_dtype;
    if (dtype == FLOAT32) {
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) square[i] = next[i] - mean[i];
    } else {
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) square[i] = stored(dtype, next[i]) - mean[i];
    }
    FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) square[i] = square[i] * square[i];
    if (call.reduce == NONE) {
      const float c0 = s.c0(call);
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i)
        square[i] = s.w == 0.0f ? c0 : score_element(c0, s.w, square[i]);
    }
    if (call.mask)
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i)
        if ((part.kept[i / 4] >> (i % 4 * 8) & 0xFFu) == 0) square[i] = 0.0f;
    if (!part.whole)
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i)
        if (i % 4 >= part.left_of(i / 4)) square[i] = 0.0f;
  }

  // x * 0 is 0 for finite x and NaN for all others. A mean that is not finite leaves no sum with it finite. Elements
  // that are not there are finite where the row's coefficients are.
  FASTFLOW_FN void mark(const Call& call, const Part& part, const float* mean, const float* next, uint8_t& to) {
    uint32_t count = 0;
    float poison = 0.0f;
    if (call.mask)
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) count += (part.kept[i / 4] >> (i % 4 * 8) & 0xFFu) != 0;
    if (call.flags) {
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) poison = poison + next[i] * 0.0f;
      if (!DRAWN && call.given)
        FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) poison = poison + mean[i] * 0.0f;
    }
    to = static_cast<uint8_t>(count | (poison == 0.0f ? 0u : 128u));
  }

  FASTFLOW_FN void write(const Tensor& t, const Span& span, const Part& part, const float* values) {
    char* row = row_of(t, span.row, t.dtype, span.first);
    if (t.dtype == FLOAT32)
      write_as(FLOAT32, row, part, values);
    else
      write_as(t.dtype, row, part, values);
  }

  FASTFLOW_FN void write_as(int dtype, char* row, const Part& part, const float* values) {
    if (part.whole) {
      FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) write_quad(dtype, row, part.at_of(h), true, 4, values + 4 * h);
    } else {
      FASTFLOW_UNROLL for (int h = 0; h < 2; ++h)
        write_quad(dtype, row, part.at_of(h), false, part.left_of(h), values + 4 * h);
    }
  }

  FASTFLOW_FN void write_affine(const Tensor& t, const Span& span, const Part& part, float on_x, const float* x,
                                float on_v, const float* v) {
    float values[ELEMENTS];
    FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) values[i] = affine(on_x, x[i], on_v, v[i]);
    write(t, span, part, values);
  }
};

}  // namespace fastflow
