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

// Up to BLOCK elements of K quantities that are summed.
template <int K>
struct Terms {
  Float of[K][VECTORS];
};

// Sums leaves c, c + stride, c + 2 stride, ... < count of `vectors` vectors each, in the order of a fold over `padded`
// (a power of two) leaves. leaf(c, terms) fills all its vectors.
template <int K, class Leaf>
static void tree(const Leaf& leaf, int64_t c, int64_t stride, int64_t count, int64_t padded, int vectors,
                 Terms<K>& sums) {
  if (stride == padded) return leaf(c, sums);
  tree(leaf, c, 2 * stride, count, padded, vectors, sums);
  Terms<K> other;
  const bool any = c + stride < count;
  if (any) tree(leaf, c + stride, 2 * stride, count, padded, vectors, other);
  for (int k = 0; k < K; ++k)
    for (int i = 0; i < vectors; ++i) sums.of[k][i] = sums.of[k][i] + (any ? other.of[k][i] : Float{});
}

template <int K, class Leaf>
static void fold_leaves(const Leaf& leaf, int64_t count, int vectors, Terms<K>& sums) {
  int64_t padded = 1;
  while (padded < count) padded *= 2;
  tree(leaf, 0, 1, count, padded, vectors, sums);
}

// Sums of values(row, first, n, terms), n <= BLOCK in each call, over n contiguous elements.
template <int K, class Values>
static void sum_run(const Values& values, int64_t row, int64_t first, int64_t n, float (&sums)[K]) {
  Terms<K> terms;
  const int width = static_cast<int>(n < BLOCK ? n : BLOCK);
  const auto leaf = [&](int64_t c, Terms<K>& out) {
    const int64_t left = n - c * BLOCK;
    const int m = static_cast<int>(left < width ? left : width);
    values(row, first + c * BLOCK, m, out);
    for (int k = 0; k < K; ++k) {
      clear_tail(out.of[k], m);
      for (int i = (m + LANES - 1) / LANES; i * LANES < width; ++i) out.of[k][i] = Float{};
    }
  };
  fold_leaves(leaf, (n + BLOCK - 1) / BLOCK, (width + LANES - 1) / LANES, terms);
  for (int k = 0; k < K; ++k) sums[k] = fold(terms.of[k], width);
}

class Groups {
 public:
  explicit Groups(const Call& call)
      : call(call),
        active(call.uncond && call.rescale != RESCALE_NONE && call.numel > 0),
        per_row(call.rescale == RESCALE_TOKEN ? call.outer * call.inner : 1) {}

  // done(group, sums[K]) for every group of the batch.
  template <int K, class Values, class Done>
  void sum(const Values& values, const Done& done) const {
    if (call.rescale == RESCALE_CLAMP)
      sum_rows<K>(values, done);
    else if (call.inner == 1)
      sum_tokens<K>(values, done);
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
    float (*partials)[K] = static_cast<float (*)[K]>(scratch.data());
    parallel(call.batch * tiles, TILE, call.threads, [&](int64_t i) {
      const int64_t first = i % tiles * TILE, left = call.numel - first;
      sum_run(values, i / tiles, first, left < TILE ? left : TILE, partials[i]);
    });
    for (int64_t row = 0; row < call.batch; ++row) {
      float (&sums)[K] = partials[row * tiles];
      for (int64_t t = 1; t < tiles; ++t)
        for (int k = 0; k < K; ++k) sums[k] = sums[k] + partials[row * tiles + t][k];
      done(row, sums);
    }
  }

  // Channels side by side: as many tokens at a time as fill a block, if they start on whole vectors.
  template <int K, class Values, class Done>
  void sum_tokens(const Values& values, const Done& done) const {
    const int64_t together = call.channels % LANES == 0 && call.channels <= BLOCK ? BLOCK / call.channels : 1;
    const int64_t chunks = (call.outer + together - 1) / together;
    parallel(call.batch * chunks, call.channels * together, call.threads, [&](int64_t i) {
      const int64_t row = i / chunks, token = i % chunks * together, left = call.outer - token;
      const int64_t tokens = left < together ? left : together;
      float sums[K];
      if (together == 1) {
        sum_run(values, row, token * call.channels, call.channels, sums);
        return done(row * call.outer + token, sums);
      }
      Terms<K> terms;
      const int channels = static_cast<int>(call.channels);
      values(row, token * channels, static_cast<int>(tokens) * channels, terms);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int k = 0; k < K; ++k) sums[k] = fold(terms.of[k] + t * (channels / LANES), channels);
        done(row * call.outer + token + t, sums);
      }
    });
  }

  // Channels that are `inner` apart: up to a block of tokens at a time.
  template <int K, class Values, class Done>
  void sum_columns(const Values& values, const Done& done) const {
    const int64_t chunks = (call.inner + BLOCK - 1) / BLOCK;
    parallel(call.batch * call.outer * chunks, call.channels * BLOCK, call.threads, [&](int64_t i) {
      const int64_t slab = i / chunks, column = i % chunks * BLOCK, left = call.inner - column;
      const int n = static_cast<int>(left < BLOCK ? left : BLOCK);
      const int64_t row = slab / call.outer, first = slab % call.outer * call.channels * call.inner + column;
      Terms<K> terms;
      const auto leaf = [&](int64_t c, Terms<K>& out) { values(row, first + c * call.inner, n, out); };
      fold_leaves(leaf, call.channels, (n + LANES - 1) / LANES, terms);
      for (int e = 0; e < n; ++e) {
        float sums[K];
        for (int k = 0; k < K; ++k) sums[k] = terms.of[k][e / LANES][e % LANES] + 0.0f;
        done(slab * call.inner + column + e, sums);
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
    const auto values = [&](int64_t row, int64_t first, int n, Terms<2>& out) {
      read(out.of[0], call.velocity, source_row(call, row), first, n);
      read_combined(out.of[1], call, RowScalars(call, row).scale, row, first, n);
      for (int i = 0; i * LANES < n; ++i) {
        out.of[0][i] = out.of[0][i] * out.of[0][i];
        out.of[1][i] = out.of[1][i] * out.of[1][i];
      }
    };
    groups_.sum<2>(values, [&](int64_t group, const float (&sums)[2]) {
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
