// SPDX-License-Identifier: Apache-2.0
// Row means of a flow-matching loss, and their gradient in the velocity. In a call of it `sample` is the clean sample,
// `given` an explicit target, `old_mean` the old network's velocity.
#pragma once

#include "../matching.h"
#include "gradient.h"

namespace fastflow {

// Whether tiles leave sums of a mean. Without an old velocity its mean is 0 and MINUS is PLUS.
FASTFLOW_FN bool sums_mean(const Call& call, int mean) {
  if (mean == SHIFT_MEAN) return static_cast<bool>(call.ref_velocity);
  return static_cast<bool>(call.old_mean) || (mean != OLD_MEAN && mean != MINUS_MEAN);
}

// Errors of two quads: of the network, of the old one, and against the reference; 0 where one is absent. CLEAN,
// VELOCITY: dtypes, VELOCITY that of all networks, where noise is drawn; ANY for all other calls.
template <int CLEAN, int VELOCITY>
struct MatchingErrors {
  static constexpr bool DRAWN = CLEAN != ANY;
  float own[ELEMENTS], old[ELEMENTS], shift[ELEMENTS];
  int at[2], left[2];  // where the quads lie in the tile, and what the row has of each
  uint32_t kept[2];
  bool scored;  // all of them count

  FASTFLOW_METHOD MatchingErrors(const Call& call, const Place& place, int thread) {
    const int64_t first = place.tile * TILE;
    FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) {
      at[h] = 4 * (h * THREADS + thread);
      left[h] = quad_left(call.numel, first + at[h]);
    }
    if (left[1] >= call.quad)
      read(call, place.row, first, true);
    else
      read(call, place.row, first, false);
  }

  // 0 where an element does not count.
  FASTFLOW_METHOD void drop(float* values) const {
    if (scored) return;
    FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i)
      if ((kept[i / 4] >> (i % 4 * 8) & 0xFFu) == 0) values[i] = 0.0f;
  }

 private:
  template <int DTYPE>
  FASTFLOW_METHOD static void widen_all(const Tensor& t, const Quad (&quads)[2], float (&values)[ELEMENTS]) {
    FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) widen<DTYPE>(t.dtype, quads[h], values + 4 * h);
  }

  FASTFLOW_METHOD void read(const Call& call, int64_t row, int64_t first, bool whole) {
    const bool given = !DRAWN && call.given, drawn = DRAWN || (!call.given && !call.noise);
    Quad clean[2], v[2], other[2], ref[2], noise[2];
    read_pair<VELOCITY>(call.velocity, row, first, at, whole, left, v);
    if (!given) read_pair<CLEAN>(call.sample, row, first, at, whole, left, clean);
    if (!drawn) read_pair<ANY>(given ? call.given : call.noise, row, first, at, whole, left, noise);
    if (call.old_mean) read_pair<VELOCITY>(call.old_mean, row, first, at, whole, left, other);
    if (call.ref_velocity) read_pair<VELOCITY>(call.ref_velocity, row, first, at, whole, left, ref);
    FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) {
      kept[h] = 0x01010101u;
      if (call.mask)
        kept[h] = read_mask(mask_of(call.mask, row, first) + at[h], whole, left[h]);
      else if (left[h] < 4)
        kept[h] &= (1u << (8 * left[h])) - 1;
    }
    scored = whole && !call.mask;
    float target[ELEMENTS], values[ELEMENTS];
    if (drawn) {
      const PhiloxKey key = philox_key(int64_at(call.seeds, row));
      const uint32_t step = static_cast<uint32_t>(int64_at(call.step, row));
      const uint64_t quad = static_cast<uint64_t>(call.offset + first) / 4;
      FASTFLOW_UNROLL for (int h = 0; h < 2; ++h)
        draw_quad(quad + static_cast<uint32_t>(at[h]) / 4, key, step, call.stream, target + 4 * h);
      if (DRAWN) {
        hold_pair<CLEAN>(clean);
        hold_pair<VELOCITY>(v);
      }
    } else {
      widen_all<ANY>(given ? call.given : call.noise, noise, target);
    }
    if (!given) {
      widen_all<CLEAN>(call.sample, clean, values);
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) target[i] = target[i] - values[i];
    }
    widen_all<VELOCITY>(call.velocity, v, own);
    FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) old[i] = shift[i] = 0.0f;
    if (call.ref_velocity) {
      widen_all<VELOCITY>(call.ref_velocity, ref, values);
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) shift[i] = own[i] - values[i];
    }
    if (call.old_mean) {
      widen_all<VELOCITY>(call.old_mean, other, values);
      FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) old[i] = values[i] - target[i];
    }
    FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i) own[i] = own[i] - target[i];
  }
};

// The sums of one tile per block, which FinishRows<MATCHING> adds.
template <int CLEAN, int VELOCITY>
struct MatchingTiles {
  static constexpr int PHASES = 3, FIRST_OF_ONE_WARP = 2, BLOCKS = CLEAN == ANY ? 3 : 4;
  struct Shared {
    alignas(16) float values[MEAN_COUNT][TILE / 2];
    float lanes[MEAN_COUNT][32];
    uint8_t kept[THREADS];
    uint32_t counts[32];
  };
  FASTFLOW_FN bool ends(const Call&) { return false; }
  FASTFLOW_FN int64_t rounds(const Call&, uint32_t) { return 1; }

  template <int PHASE>
  FASTFLOW_FN void phase(const Call& call, uint32_t block, int thread, int64_t, Shared& shared) {
    const Place at = place_of<false>(call.geometry, block, thread);
    const int k = thread / 32, lane = thread % 32;
    if constexpr (PHASE == 0) {
      terms(call, at, thread, shared);
    } else if constexpr (PHASE == 1) {
      if (k < MEAN_COUNT) {
        if (sums_mean(call, k)) shared.lanes[k][lane] = fold_lane(shared.values[k], THREADS, lane);
      } else if (k == MEAN_COUNT && call.marked) {
        uint32_t count = 0;
        FASTFLOW_UNROLL for (int i = 0; i < THREADS / 32; ++i) count += shared.kept[lane + 32 * i];
        shared.counts[lane] = count;
      }
    } else {
      const int64_t tile = at.row * call.geometry.tiles + at.tile;
      if (thread < MEAN_COUNT) {
        if (sums_mean(call, thread))
          call.sums[thread * call.batch * call.geometry.tiles + tile] = fold_lanes(shared.lanes[thread]);
      } else if (thread == MEAN_COUNT && call.marked) {
        uint32_t count = 0;
        FASTFLOW_UNROLL for (int i = 0; i < 32; ++i) count += shared.counts[i];
        call.marks[tile] = count;
      }
    }
  }

 private:
  FASTFLOW_FN void terms(const Call& call, const Place& at, int thread, Shared& shared) {
    MatchingErrors<CLEAN, VELOCITY> e(call, at, thread);
    e.drop(e.own), e.drop(e.old), e.drop(e.shift);
    if (call.marked) shared.kept[thread] = static_cast<uint8_t>(kept_of(e.kept[0]) + kept_of(e.kept[1]));
    const float beta = call.beta;
    const auto stage = [&](int mean, const auto& term) {
      Words4 words;
      FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) words.at[i] = Scalar::as_bits(term(i) + term(i + 4));
      *reinterpret_cast<Words4*>(shared.values[mean] + 4 * thread) = words;
    };
    stage(SQUARE_MEAN, [&](int i) { return e.own[i] * e.own[i]; });
    stage(CROSS_MEAN, [&](int i) { return e.own[i] * e.old[i]; });
    stage(PLUS_MEAN, [&](int i) { return plus_error(beta, e.own[i], e.old[i]); });
    if (call.old_mean) {
      stage(OLD_MEAN, [&](int i) { return e.old[i] * e.old[i]; });
      stage(MINUS_MEAN, [&](int i) { return minus_error(beta, e.own[i], e.old[i]); });
    }
    if (call.ref_velocity) stage(SHIFT_MEAN, [&](int i) { return e.shift[i] * e.shift[i]; });
  }

  FASTFLOW_FN int kept_of(uint32_t bytes) {
    int kept = 0;
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) kept += (bytes >> (8 * i) & 0xFFu) != 0;
    return kept;
  }
};

// The gradient of one tile per block.
template <int CLEAN, int VELOCITY>
struct MatchingGradient {
  static constexpr int PHASES = 1, FIRST_OF_ONE_WARP = PHASES, BLOCKS = CLEAN == ANY ? 3 : 4;
  struct Shared {};
  FASTFLOW_FN bool ends(const Call&) { return true; }
  FASTFLOW_FN int64_t rounds(const Call&, uint32_t) { return 1; }

  template <int PHASE>
  FASTFLOW_FN void phase(const Call& call, uint32_t block, int thread, int64_t, Shared&) {
    const Place at = place_of<false>(call.geometry, block, thread);
    const float count = call.mask ? call.counts[at.row] : static_cast<float>(call.numel);
    const MatchingSlopes on =
        matching_slopes(reinterpret_cast<const float*>(call.grad_means.data) + at.row, call.batch, count);
    MatchingErrors<CLEAN, VELOCITY> e(call, at, thread);
    FASTFLOW_UNROLL for (int i = 0; i < ELEMENTS; ++i)
      e.own[i] = matching_gradient(on, e.own[i], e.old[i], e.shift[i]);
    e.drop(e.own);
    const int dtype = VELOCITY == ANY ? call.grad_velocity.dtype : VELOCITY;
    char* to = row_of(call.grad_velocity, at.row, dtype, at.tile * TILE);
    FASTFLOW_UNROLL for (int h = 0; h < 2; ++h)
      write_quad(dtype, to, e.at[h], e.left[h] >= call.quad, e.left[h], e.own + 4 * h);
  }
};

}  // namespace fastflow
