// SPDX-License-Identifier: Apache-2.0
// The second pass over rows that several blocks share: their tiles' sums, added in order.
#pragma once

#include "matching.h"

namespace fastflow {

enum Finish { SCORES, FACTORS, SLOPES, COUNTS, MEANS, MATCHING };

// A row per block. SCORES: log_prob and flags from one sum. FACTORS, SLOPES: of a clamped row, from two and three.
// COUNTS: how many elements are scored, from the marks. MEANS: shift, drift and a replay's score, from three. MATCHING:
// the means of a matching loss.
template <int KIND>
struct FinishRows {
  static constexpr int SUMS_OF[] = {1, 2, 3, 0, 3, MEAN_COUNT}, SUMS = SUMS_OF[KIND];
  static constexpr int STAGED = KIND == MATCHING ? 512 : 2048;  // tiles at a time
  static constexpr int PHASES = 3, FIRST_OF_ONE_WARP = PHASES, BLOCKS = 4;

  struct Shared {
    alignas(16) float staged[SUMS ? SUMS : 1][STAGED];
    float sums[SUMS ? SUMS : 1];
    int64_t counts[THREADS], lane_counts[32];
    bool bads[THREADS], lane_bads[32];
  };

  FASTFLOW_FN bool ends(const Call&) { return false; }
  FASTFLOW_FN int64_t rounds(const Call& call, uint32_t) { return (call.geometry.tiles + STAGED - 1) / STAGED; }
  FASTFLOW_FN bool marked(const Call& call) {
    return KIND == COUNTS || ((KIND == SCORES || KIND == MATCHING) && call.marked);
  }
  FASTFLOW_FN bool summed(const Call& call, int k) { return KIND != MATCHING || sums_mean(call, k); }

  template <int PHASE>
  FASTFLOW_FN void phase(const Call& call, uint32_t block, int thread, int64_t round, Shared& shared) {
    const int64_t row = block, tiles = call.geometry.tiles, first = round * STAGED, left = tiles - first;
    const int count = static_cast<int>(left < STAGED ? left : STAGED);
    const bool last = left <= STAGED;
    if constexpr (PHASE == 0) {
      const int64_t from = row * tiles + first;
      FASTFLOW_UNROLL for (int k = 0; k < SUMS; ++k)
        for (int i = thread; summed(call, k) && i < count; i += THREADS)
          shared.staged[k][i] = call.sums[k * call.batch * tiles + from + i];
      if (!marked(call)) return;
      int64_t scored = round ? shared.counts[thread] : 0;
      bool bad = round && shared.bads[thread];
      for (int i = thread; i < count; i += THREADS) {
        const uint32_t mark = call.marks[from + i];
        scored += mark & ~BAD;
        bad = bad || (mark & BAD);
      }
      shared.counts[thread] = scored, shared.bads[thread] = bad;
    } else if constexpr (PHASE == 1) {
      if (thread % 32 == 0 && thread / 32 < SUMS && summed(call, thread / 32)) {
        const int k = thread / 32;
        float sum = round ? shared.sums[k] : shared.staged[k][0];
#if defined(__CUDACC__)
#pragma unroll 8
#endif
        for (int i = round ? 0 : 1; i < count; ++i) sum = sum + shared.staged[k][i];
        shared.sums[k] = sum;
      }
      const int lane = thread - (THREADS - 32);
      if (last && marked(call) && lane >= 0)
        fold_marks<THREADS / 32>(shared.counts + lane, shared.bads + lane, 32, shared.lane_counts[lane],
                                 shared.lane_bads[lane]);
    } else {
      if (!last || thread) return;
      int64_t scored = 0;
      bool bad = false;
      if (marked(call)) fold_marks<32>(shared.lane_counts, shared.lane_bads, 1, scored, bad);
      if constexpr (KIND == SCORES) {
        finish_row(call, row, shared.sums[0], scored, bad);
      } else if constexpr (KIND == FACTORS) {
        call.factors[row] = rescale_factor(call.rescale, shared.sums[0], shared.sums[1]).factor;
      } else if constexpr (KIND == SLOPES) {
        const RescaleFactor factor = rescale_factor(call.rescale, shared.sums[0], shared.sums[1]);
        const RescaleSlopes slopes = rescale_slopes(factor, shared.sums[0], shared.sums[1], shared.sums[2]);
        call.on_guided[row] = slopes.on_guided;
        call.on_velocity[row] = slopes.on_velocity;
      } else if constexpr (KIND == MEANS) {
        const float n = call.mask ? call.counts[row] : static_cast<float>(call.numel);
        const Tensor* slots[] = {&call.shift, &call.drift};
        FASTFLOW_UNROLL for (int k = 0; k < 2; ++k)
          if (*slots[k])
            reinterpret_cast<float*>(slots[k]->data)[row * slots[k]->stride] = n == 0.0f ? 0.0f : shared.sums[k] / n;
        if (call.compared) finish_row(call, row, shared.sums[2], static_cast<int64_t>(n), false);
      } else if constexpr (KIND == MATCHING) {
        const float n = static_cast<float>(call.mask ? scored : call.numel);
        float* means = reinterpret_cast<float*>(call.means.data) + row;
        FASTFLOW_UNROLL for (int k = 0; k < SUMS; ++k) {
          const int from = k == MINUS_MEAN && !call.old_mean ? PLUS_MEAN : k;
          means[k * call.batch] = n == 0.0f || !summed(call, from) ? 0.0f : shared.sums[from] / n;
        }
      } else {
        call.counts[row] = static_cast<float>(scored);
      }
    }
  }

 private:
  template <int COUNT>
  FASTFLOW_FN void fold_marks(const int64_t* counts, const bool* bads, int stride, int64_t& scored, bool& bad) {
    int64_t sum = 0;
    bool any = false;
    FASTFLOW_UNROLL for (int i = 0; i < COUNT; ++i) {
      sum += counts[i * stride];
      any = any | bads[i * stride];
    }
    scored = sum, bad = any;
  }
};

// Marks of one tile per block: how many of its elements the mask keeps.
struct CountTiles {
  static constexpr int PHASES = 3, FIRST_OF_ONE_WARP = 1, BLOCKS = 4;
  struct Shared {
    uint8_t kept[THREADS];
    uint32_t lanes[32];
  };
  FASTFLOW_FN bool ends(const Call&) { return false; }
  FASTFLOW_FN int64_t rounds(const Call&, uint32_t) { return 1; }

  template <int PHASE>
  FASTFLOW_FN void phase(const Call& call, uint32_t block, int thread, int64_t, Shared& shared) {
    const Place at = place_of<false>(call.geometry, block, thread);
    if constexpr (PHASE == 0) {
      int kept = 0;
      FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) {
        const int64_t element = at.tile * TILE + 4 * (h * THREADS + thread);
        const int left = quad_left(call.numel, element);
        const uint32_t bytes = read_mask(mask_of(call.mask, at.row, element), left >= call.quad, left);
        FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) kept += (bytes >> (8 * i) & 0xFFu) != 0;
      }
      shared.kept[thread] = static_cast<uint8_t>(kept);
    } else if constexpr (PHASE == 1) {
      uint32_t sum = 0;
      FASTFLOW_UNROLL for (int i = 0; i < THREADS / 32; ++i) sum += shared.kept[thread + 32 * i];
      shared.lanes[thread] = sum;
    } else if (thread == 0) {
      uint32_t sum = 0;
      FASTFLOW_UNROLL for (int i = 0; i < 32; ++i) sum += shared.lanes[i];
      call.marks[at.row * call.geometry.tiles + at.tile] = sum;
    }
  }
};

}  // namespace fastflow
