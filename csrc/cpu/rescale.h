// SPDX-License-Identifier: Apache-2.0
// Group sums and the factors of a rescaled guidance. A group is a token (its channels) or, under clamp, the whole row.
#pragma once

#include "block.h"
#include "parallel.h"

namespace fastflow::FASTFLOW_ISA {

constexpr int GRAIN = 8192;  // elements that are worth handing to a thread

// body(i) for i in [0, items), each about `size` elements of work.
template <class Body>
static void parallel(int64_t items, int64_t size, int threads, const Body& body) {
  const auto range = [](void* context, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
  };
  run_ranges(items, size < GRAIN ? GRAIN / (size > 0 ? size : 1) : 1, threads, range, const_cast<Body*>(&body));
}

// Sums leaves c, c + stride, c + 2 stride, ... < count in the order of a fold over `padded` (a power of two) leaves.
template <int K, class Leaf>
static void tree(const Leaf& leaf, int64_t c, int64_t stride, int64_t count, int64_t padded, Float (&sums)[K]) {
  if (stride == padded) return leaf(c, sums);
  tree(leaf, c, 2 * stride, count, padded, sums);
  Float other[K] = {};
  if (c + stride < count) tree(leaf, c + stride, 2 * stride, count, padded, other);
  for (int k = 0; k < K; ++k) sums[k] = sums[k] + other[k];
}

template <int K, class Leaf>
static void fold_leaves(const Leaf& leaf, int64_t count, Float (&sums)[K]) {
  int64_t padded = 1;
  while (padded < count) padded *= 2;
  tree(leaf, 0, 1, count, padded, sums);
}

// Sums of values(row, first, n, out[K]) over n contiguous elements; n <= LANES in each call, lanes beyond n must be 0.
template <int K, class Values>
static void sum_run(const Values& values, int64_t row, int64_t first, int64_t n, float (&sums)[K]) {
  Float folded[K];
  const auto leaf = [&](int64_t c, Float(&out)[K]) {
    const int64_t left = n - c * LANES;
    values(row, first + c * LANES, static_cast<int>(left < LANES ? left : LANES), out);
  };
  fold_leaves(leaf, (n + LANES - 1) / LANES, folded);
  for (int k = 0; k < K; ++k) sums[k] = Vector::fold(folded[k]) + 0.0f;
}

class Groups {
 public:
  explicit Groups(const Call& call)
      : call(call), active(call.uncond && call.rescale != RESCALE_NONE && call.numel > 0),
        per_row(call.rescale == RESCALE_TOKEN ? call.outer * call.inner : 1) {}

  // done(group, sums[K]) for every group of the batch.
  template <int K, class Values, class Done>
  void sum(const Values& values, const Done& done) const {
    if (call.rescale == RESCALE_CLAMP)
      sum_rows<K>(values, done);
    else if (call.inner == 1)
      parallel(call.batch * call.outer, call.channels, call.threads, [&](int64_t token) {
        float sums[K];
        sum_run(values, token / call.outer, token % call.outer * call.channels, call.channels, sums);
        done(token, sums);
      });
    else
      sum_columns<K>(values, done);
  }

  // out[i] = the group's value for element first + i of a row.
  void expand(const float* groups, int64_t row, int64_t first, int n, Float* out) const {
    float* to = reinterpret_cast<float*>(out);
    groups += row * per_row;
    for (int i = 0; i < n;) {
      const int64_t element = first + i;
      const int64_t run = call.inner == 1 ? call.channels : call.inner;
      const int64_t left = call.rescale == RESCALE_CLAMP ? n - i : run - element % run;
      const int m = static_cast<int>(left < n - i ? left : n - i);
      if (call.rescale == RESCALE_CLAMP || call.inner == 1) {
        const float value = groups[call.rescale == RESCALE_CLAMP ? 0 : element / call.channels];
        for (int j = 0; j < m; ++j) to[i + j] = value;
      } else {
        const float* from = groups + element / (call.channels * call.inner) * call.inner + element % call.inner;
        for (int j = 0; j < m; ++j) to[i + j] = from[j];
      }
      i += m;
    }
    for (int i = n; i % LANES; ++i) to[i] = 0.0f;
  }

  const Call& call;
  const bool active;
  const int64_t per_row;

 private:
  template <int K, class Values, class Done>
  void sum_rows(const Values& values, const Done& done) const {
    const int64_t tiles = (call.numel + TILE - 1) / TILE;
    const Scratch scratch(call.batch * tiles * K * sizeof(float));
    float(*partials)[K] = static_cast<float(*)[K]>(scratch.data());
    parallel(call.batch * tiles, TILE, call.threads, [&](int64_t i) {
      const int64_t first = i % tiles * TILE, left = call.numel - first;
      sum_run(values, i / tiles, first, left < TILE ? left : TILE, partials[i]);
    });
    for (int64_t row = 0; row < call.batch; ++row) {
      float(&sums)[K] = partials[row * tiles];
      for (int64_t t = 1; t < tiles; ++t)
        for (int k = 0; k < K; ++k) sums[k] = sums[k] + partials[row * tiles + t][k];
      done(row, sums);
    }
  }

  // Channels that are `inner` apart: LANES tokens at a time.
  template <int K, class Values, class Done>
  void sum_columns(const Values& values, const Done& done) const {
    const int64_t chunks = (call.inner + LANES - 1) / LANES;
    parallel(call.batch * call.outer * chunks, call.channels * LANES, call.threads, [&](int64_t i) {
      const int64_t block = i / chunks, column = i % chunks * LANES, left = call.inner - column;
      const int n = static_cast<int>(left < LANES ? left : LANES);
      const int64_t row = block / call.outer, first = block % call.outer * call.channels * call.inner + column;
      Float folded[K];
      const auto leaf = [&](int64_t c, Float(&out)[K]) { values(row, first + c * call.inner, n, out); };
      fold_leaves(leaf, call.channels, folded);
      for (int lane = 0; lane < n; ++lane) {
        float sums[K];
        for (int k = 0; k < K; ++k) sums[k] = folded[k][lane] + 0.0f;
        done(block * call.inner + column + lane, sums);
      }
    });
  }
};

// What a guided velocity is multiplied with.
class Factors {
 public:
  explicit Factors(const Call& call)
      : groups_(call), scratch_(groups_.active ? call.batch * groups_.per_row * sizeof(float) : 0) {
    if (!groups_.active) return;
    const auto values = [&](int64_t row, int64_t first, int n, Float(&out)[2]) {
      Float v, guided;
      read(&v, call.velocity, row, first, n);
      read_combined(&guided, call, RowScalars(call, row).scale, row, first, n);
      out[0] = v * v;
      out[1] = guided * guided;
    };
    groups_.sum<2>(values, [&](int64_t group, const float(&sums)[2]) {
      factors()[group] = rescale_factor(call.rescale, sums[0], sums[1]).factor;
    });
  }

  // v *= factor; writes the factors of the block too where `used` is given.
  void apply(Float* v, int64_t row, int64_t first, int n, Float* used = nullptr) const {
    if (!groups_.active) return;
    Float block[VECTORS];
    if (!used) used = block;
    groups_.expand(factors(), row, first, n, used);
    for (int k = 0; k * LANES < n; ++k) v[k] = v[k] * used[k];
  }

  const Groups& groups() const { return groups_; }

 private:
  float* factors() const { return static_cast<float*>(scratch_.data()); }
  Groups groups_;
  Scratch scratch_;
};

}  // namespace fastflow::FASTFLOW_ISA
