// SPDX-License-Identifier: Apache-2.0
// What the kernels share: where a thread stands, the scalars of its row, its noise, and the fold of a tile.
//
// A kernel is a program: phases of one thread each, which meet only through shared memory. Between two phases all
// threads of the block wait for each other. kernels.cu runs programs on a GPU; any loop over threads runs them elsewhere.
#pragma once

#include "../normal.h"
#include "../philox.h"
#include "access.h"

namespace fastflow {

// A thread's place. Its elements in a tile are the quads at 4 * lane and 4 * (team + lane), which the first level of
// the tile's fold adds. A row of one short tile has a smaller team: what the tile lacks is zeros, which change no sum.
struct Place {
  int64_t row, tile;  // the first tile of the block
  int tiles;          // of the block
  int lane, team;     // among the threads that share the row
  int slot;           // of the row in the block
};

// TEAMS: rows may be shorter than a block. Otherwise a block has one row, which the compiler is told.
template <bool TEAMS>
FASTFLOW_FN Place place_of(const Geometry& g, uint32_t block, int thread) {
  const uint32_t first = g.spans.small_quotient(block);
  const int64_t tile = static_cast<int64_t>(block - first * static_cast<uint32_t>(g.spans.divisor)) * g.span;
  const int64_t left = g.tiles - tile;
  const int log_team = TEAMS ? g.log_team : 8;
  const int slot = TEAMS ? thread >> log_team : 0;
  const int64_t row = TEAMS ? static_cast<int64_t>(first) * (THREADS >> log_team) + slot : first;
  return {row, tile, static_cast<int>(left < g.span ? left : g.span), TEAMS ? thread & ((1 << log_team) - 1) : thread,
          1 << log_team, slot};
}

// How many of a quad's elements the row has.
FASTFLOW_FN int quad_left(int64_t numel, int64_t element) {
  const int64_t left = numel - element;
  return left >= 4 ? 4 : left > 0 ? static_cast<int>(left) : 0;
}

struct RowScalars {
  const float* t;
  float a, b, w, scale;

  FASTFLOW_METHOD RowScalars(const Call& call, int64_t row) {
    t = reinterpret_cast<const float*>(call.coef.data) + row * call.coef.stride;
    a = t[A], b = t[B];
    w = call.score == SQUARE ? 1.0f : t[W];
    scale = call.scale ? float_at(call.scale, row) : 1.0f;
  }
  FASTFLOW_METHOD float c0(const Call& call) const { return call.score == GAUSSIAN ? t[C0] : 0.0f; }
};

// Scalar, but for a square root without the branch for subnormal numbers and infinities, and a product of 32 bits.
struct Lane : Scalar {
  // IEEE root of x = 0 or 2^-100 <= x <= 2^100: the steps of the compiler's own root for such x.
  FASTFLOW_FN float root(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    const float s = x * y, h = 0.5f * y;
    const float root = __fmaf_rn(__fmaf_rn(-s, s, x), h, s);
    return x == 0.0f ? x : root;
#else
    return Scalar::root(x);
#endif
  }
  FASTFLOW_FN Word multiply(Word x, uint32_t m) {
#if defined(__CUDA_ARCH__)
    Word product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(static_cast<uint32_t>(x)), "r"(m));
    return product;
#else
    return Scalar::multiply(x, m);
#endif
  }
};

// Standard normal draws for elements 4q ... 4q + 3.
FASTFLOW_FN void draw_quad(uint64_t q, PhiloxKey key, uint32_t step, uint32_t stream, float* z) {
  uint64_t words[4] = {q, q >> 32, step, stream};
  philox4x32<Lane>(words, key);
  box_muller<Lane>(static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]), z[0], z[1]);
  box_muller<Lane>(static_cast<uint32_t>(words[2]), static_cast<uint32_t>(words[3]), z[2], z[3]);
}

// values[i] += values[i + h] for h = COUNT / 2, ..., 1.
template <int COUNT>
FASTFLOW_FN float fold(float* values) {
  if constexpr (COUNT == 1) {
    return values[0];
  } else {
    FASTFLOW_UNROLL for (int i = 0; i < COUNT / 2; ++i) values[i] = values[i] + values[i + COUNT / 2];
    return fold<COUNT / 2>(values);
  }
}

template <int COUNT>
FASTFLOW_FN float fold_every(const float* values, int stride, int width) {
  float v[COUNT];
  FASTFLOW_UNROLL for (int i = 0; i < COUNT; ++i) v[i] = i < width ? values[i * stride] : 0.0f;
  return fold<COUNT>(v);
}

// `team` threads each leave four values of a tile, folded once; a warp folds them to 32 and one thread to the sum.
FASTFLOW_FN float fold_lane(const float* values, int team, int lane) {
  if (team == THREADS) return fold_every<32>(values + lane, 32, 32);
  return fold_every<16>(values + lane, 32, team / 8);
}
FASTFLOW_FN float fold_lanes(const float* lanes) {
  return fold_every<32>(lanes, 1, 32) + 0.0f;  // a fold over padding has no negative zero
}

// What a step leaves of its tiles: sums, and marks.
FASTFLOW_FN uint32_t add_marks(uint32_t a, uint32_t b) { return ((a & ~BAD) + (b & ~BAD)) | ((a | b) & BAD); }

FASTFLOW_FN void finish_row(const Call& call, int64_t row, float sum, int64_t count, bool bad) {
  if (call.reduces) {
    const RowScalars s(call, row);
    const float n = static_cast<float>(call.mask ? count : call.numel);
    reinterpret_cast<float*>(call.log_prob.data)[row * call.log_prob.stride] =
        score_row(call.reduce, s.c0(call), s.w, sum, n);
  }
  if (call.flags) reinterpret_cast<int32_t*>(call.flags.data)[row * call.flags.stride] = flags_of(call, row, bad);
}

// The group of an element whose velocity is rescaled.
FASTFLOW_FN int64_t group_of(const Call& call, int64_t row, int64_t element) {
  if (call.rescale == RESCALE_CLAMP) return row;
  const int64_t slab = call.by_slab.quotient(element);  // of channels * inner elements
  const int64_t inner = call.inner == 1 ? 0 : element - call.by_inner.quotient(element) * call.inner;
  return row * call.groups + slab * call.inner + inner;
}

}  // namespace fastflow
