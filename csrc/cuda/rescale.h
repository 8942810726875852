// SPDX-License-Identifier: Apache-2.0
// Sums over rows, and over the groups of a rescaled guidance: of the squares of the velocity and of the guided one
// (SQUARES, for the factor), and of gradient * guided (GRADIENT, for the slopes).
#pragma once

#include "gradient.h"

namespace fastflow {

// What is summed of half h; 0 where there is no element.
template <int SAMPLE, int VELOCITY, int PURPOSE, int SUMS>
FASTFLOW_FN void make_terms(const Call& call, const Inputs<SAMPLE, VELOCITY, PURPOSE>& in, int h, const RowScalars& s,
                            const RowSlopes& slopes, float (&terms)[SUMS][4]) {
  const int left = in.left[h];
  float v[4], guided[4];
  in.guide(call, s, h, v, guided);
  if constexpr (PURPOSE == GRADIENT) {
    float factor[4], gradient[4];
    make_gradient(call, in, h, s, slopes, guided, factor, gradient);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) terms[2][i] = i < left ? gradient[i] * guided[i] : 0.0f;
  }
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) {
    terms[0][i] = i < left ? v[i] * v[i] : 0.0f;
    terms[1][i] = i < left ? guided[i] * guided[i] : 0.0f;
  }
}

// Squares of what shift and drift are the means of, and those of a replay's score; 0 where an element is not scored.
template <int SAMPLE, int VELOCITY>
FASTFLOW_FN void make_terms(const Call& call, const Inputs<SAMPLE, VELOCITY, DIFFERENCES>& in, int h,
                            const RowScalars& s, const RowSlopes&, float (&terms)[3][4]) {
  float v[4], guided[4], other[4], mean[4], factor[4];
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) terms[0][i] = terms[1][i] = terms[2][i] = 0.0f;
  in.guide(call, s, h, v, guided);
  if (in.rescaled(call)) in.rescale(call, call.factors, h, guided, factor);
  if (call.shift) {
    in.guide_reference(call, s, h, other);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) terms[0][i] = guided[i] - other[i];
  }
  if (call.drift || call.compared) in.make_mean(call, s, h, guided, mean);
  if (call.drift) {
    widen<SAMPLE>(call.old_mean.dtype, in.old[h], other);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) terms[1][i] = mean[i] - other[i];
  }
  if (call.compared) {
    widen<SAMPLE>(call.given.dtype, in.given[h], other);
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) terms[2][i] = other[i] - mean[i];
  }
  FASTFLOW_UNROLL for (int k = 0; k < 3; ++k) {
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) terms[k][i] = terms[k][i] * terms[k][i];
    in.drop_unscored(h, terms[k]);
  }
}

// The sums of one tile per block: of a clamped row's group, which is the row, or of DIFFERENCES.
template <int SAMPLE, int VELOCITY, int PURPOSE>
struct RowTiles {
  static constexpr int SUMS = PURPOSE == SQUARES ? 2 : 3;
  static constexpr int PHASES = 3, FIRST_OF_ONE_WARP = 2;
  static constexpr int BLOCKS = PURPOSE == SQUARES ? 4 : SAMPLE == ANY ? 2 : VELOCITY == FLOAT32 ? 3 : 4;
  struct Shared {
    alignas(16) float values[SUMS][TILE / 2];
    float lanes[SUMS][32];
  };
  FASTFLOW_FN bool ends(const Call&) { return false; }
  FASTFLOW_FN int64_t rounds(const Call&, uint32_t) { return 1; }

  template <int PHASE>
  FASTFLOW_FN void phase(const Call& call, uint32_t block, int thread, int64_t, Shared& shared) {
    const Place at = place_of<false>(call.geometry, block, thread);
    if constexpr (PHASE == 0) {
      Inputs<SAMPLE, VELOCITY, PURPOSE> in(call, at.row);
      in.read(call, at.tile * TILE, thread, THREADS);
      const RowScalars s(call, at.row);
      const RowSlopes slopes = PURPOSE == GRADIENT ? slopes_of(call, s, at.row) : RowSlopes();
      in.wait();
      float terms[2][SUMS][4];
      FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) make_terms(call, in, h, s, slopes, terms[h]);
      FASTFLOW_UNROLL for (int k = 0; k < SUMS; ++k)
        FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
          shared.values[k][4 * thread + i] = terms[0][k][i] + terms[1][k][i];
    } else if constexpr (PHASE == 1) {
      const int k = thread / 32, lane = thread % 32;
      if (k < SUMS) shared.lanes[k][lane] = fold_lane(shared.values[k], THREADS, lane);
    } else if (thread < SUMS) {
      const int64_t tile = at.row * call.geometry.tiles + at.tile;
      call.sums[thread * call.batch * call.geometry.tiles + tile] = fold_lanes(shared.lanes[thread]);
    }
  }
};

constexpr int MAX_CHANNELS = 2 * TILE;

// Tokens: a block takes as many of a row's as fill a tile, each padded to a power of two of channels. Values lie
// channel by channel where that is how they are read (inner == 1), token by token otherwise.
template <int PURPOSE>
struct Tokens {
  static constexpr int SUMS = PURPOSE == SQUARES ? 2 : 3;
  static constexpr int PHASES = 5, FIRST_OF_ONE_WARP = PHASES, BLOCKS = 4;
  struct Shared {
    float values[SUMS][TILE];
  };
  FASTFLOW_FN bool ends(const Call&) { return false; }
  FASTFLOW_FN int64_t rounds(const Call&, uint32_t) { return 1; }

  FASTFLOW_FN int log_padded(int64_t channels) {  // within a tile
    int log = 0;
    while (log < 11 && (int64_t{1} << log) < channels) ++log;
    return log;
  }
  FASTFLOW_FN int64_t per_block(int64_t channels) { return TILE >> log_padded(channels); }

  template <int PHASE>
  FASTFLOW_FN void phase(const Call& call, uint32_t block, int thread, int64_t, Shared& shared) {
    const uint32_t row = call.geometry.spans.small_quotient(block);
    const int log = log_padded(call.channels), tokens = TILE >> log;
    const uint32_t blocks = static_cast<uint32_t>(call.geometry.spans.divisor);
    const int64_t first = static_cast<int64_t>(block - row * blocks) * tokens;
    if constexpr (PHASE == 0) {
      const RowScalars s(call, row);
      const RowSlopes slopes = PURPOSE == GRADIENT ? slopes_of(call, s, row) : RowSlopes();
      for (int i = thread; i < TILE; i += THREADS) {
        const int token = call.inner == 1 ? i >> log : i & (tokens - 1);
        const int channel = call.inner == 1 ? i & ((1 << log) - 1) : i >> (11 - log);
        leaf(call, s, slopes, row, first + token, channel, i, shared);
      }
    } else {
      // What is left of a token after the phases before, and after this one: it folds 8 values into one.
      const int before = log > 3 * (PHASE - 1) ? log - 3 * (PHASE - 1) : 0, after = before > 3 ? before - 3 : 0;
      if (before == 0 && PHASE > 1) return;
      for (int i = thread; i < tokens << after; i += THREADS) {
        const int token = call.inner == 1 ? i >> after : i & (tokens - 1);
        const int place = call.inner == 1 ? i & ((1 << after) - 1) : i >> (11 - log);
        const int at = call.inner == 1 ? (token << log) + place : (place << (11 - log)) + token;
        const int stride = call.inner == 1 ? 1 << after : 1 << (after + 11 - log);
        float sums[SUMS];
        FASTFLOW_UNROLL for (int k = 0; k < SUMS; ++k)
          sums[k] = fold_every<8>(shared.values[k] + at, stride, 1 << (before - after));
        if (after)
          FASTFLOW_UNROLL for (int k = 0; k < SUMS; ++k) shared.values[k][at] = sums[k];
        else if (first + token < call.groups)
          finish(call, row * call.groups + first + token, sums);
      }
    }
  }

 private:
  // The terms of one channel, with those of the channel a tile further on added.
  FASTFLOW_FN void leaf(const Call& call, const RowScalars& s, const RowSlopes& slopes, int64_t row, int64_t token,
                        int channel, int at, Shared& shared) {
    const int64_t slab = call.by_inner.quotient(token);
    const int64_t origin = slab * call.channels * call.inner + (token - slab * call.inner);
    float terms[2][SUMS][4] = {};
    Inputs<ANY, ANY, PURPOSE> in(call, row);
    FASTFLOW_UNROLL for (int j = 0; j < 2; ++j) {
      const int64_t c = channel + j * TILE;
      if (token >= call.groups || c >= call.channels) continue;
      in.read_one(call, origin + c * call.inner);
      make_terms(call, in, 0, s, slopes, terms[j]);
    }
    FASTFLOW_UNROLL for (int k = 0; k < SUMS; ++k) shared.values[k][at] = terms[0][k][0] + terms[1][k][0];
  }

  FASTFLOW_FN void finish(const Call& call, int64_t group, const float (&sums)[SUMS]) {
    const RescaleFactor factor = rescale_factor(call.rescale, sums[0] + 0.0f, sums[1] + 0.0f);
    if constexpr (PURPOSE == SQUARES) {
      call.factors[group] = factor.factor;
    } else {
      const RescaleSlopes slopes = rescale_slopes(factor, sums[0] + 0.0f, sums[1] + 0.0f, sums[2] + 0.0f);
      call.on_guided[group] = slopes.on_guided;
      call.on_velocity[group] = slopes.on_velocity;
    }
  }
};

}  // namespace fastflow
