// SPDX-License-Identifier: Apache-2.0
// Row means of a flow-matching loss: squares against the target noise - clean, whose noise is drawn again where it was drawn
// before, and against other networks' velocities.
#pragma once

#include "../matching.h"
#include "rescale.h"

namespace fastflow::FASTFLOW_ISA {

class Matching {
 public:
  explicit Matching(const Call& call) : call_(call) {}

  void sums() const {
    const int64_t tiles = (call_.numel + TILE - 1) / TILE;
    const Scratch scratch(call_.batch * tiles * MEAN_COUNT * sizeof(float));
    float (*partials)[MEAN_COUNT] = static_cast<float (*)[MEAN_COUNT]>(scratch.data());
    const auto values = [&](int64_t row, int64_t first, int n, Terms<MEAN_COUNT>& out) { terms(row, first, n, out); };
    parallel(call_.batch * tiles, TILE, call_.threads, [&](int64_t i) {
      const int64_t first = i % tiles * TILE, left = call_.numel - first;
      sum_run(values, i / tiles, first, left < TILE ? left : TILE, partials[i]);
    });
    for (int64_t row = 0; row < call_.batch; ++row) {
      const float n = count(row);
      for (int k = 0; k < MEAN_COUNT; ++k) {
        float sum = partials[row * tiles][k];
        for (int64_t t = 1; t < tiles; ++t) sum = sum + partials[row * tiles + t][k];
        means(row, k) = n == 0.0f ? 0.0f : sum / n;
      }
    }
  }

  void gradient() const {
    const int64_t blocks = (call_.numel + BLOCK - 1) / BLOCK;
    const Scratch scratch(call_.batch * sizeof(float));
    float* counts = static_cast<float*>(scratch.data());
    for (int64_t row = 0; row < call_.batch; ++row) counts[row] = count(row);
    parallel(call_.batch * blocks, BLOCK, call_.threads, [&](int64_t i) {
      const int64_t row = i / blocks, first = i % blocks * BLOCK, left = call_.numel - first;
      block(row, first, static_cast<int>(left < BLOCK ? left : BLOCK), counts[row]);
    });
  }

 private:
  float& means(int64_t row, int k) const {
    return reinterpret_cast<float*>(call_.means.data)[k * call_.batch + row];
  }

  float count(int64_t row) const {
    if (!call_.mask) return static_cast<float>(call_.numel);
    int64_t count = 0;
    for (int64_t first = 0; first < call_.numel; first += TILE) {
      const int64_t left = call_.numel - first;
      count += count_mask(call_.mask, row, first, static_cast<int>(left < TILE ? left : TILE));
    }
    return static_cast<float>(count);
  }

  // What the network should have said: given, or noise - clean.
  void target(Float* out, int64_t row, int64_t first, int n) const {
    if (call_.given) return read(out, call_.given, row, first, n);
    Float clean[VECTORS];
    if (call_.noise)
      read(out, call_.noise, row, first, n);
    else
      draw(out, n, static_cast<uint64_t>(call_.offset + first) / 4, philox_key(int64_at(call_.seeds, row)),
           static_cast<uint32_t>(int64_at(call_.step, row)), call_.stream);
    read(clean, call_.sample, row, first, n);
    for (int k = 0; k * LANES < n; ++k) out[k] = out[k] - clean[k];
  }

  // Errors of the network and of the old one; absent ones are 0.
  void errors(int64_t row, int64_t first, int n, Float* own, Float* old, Float* shift) const {
    Float wanted[VECTORS], v[VECTORS];
    target(wanted, row, first, n);
    read(v, call_.velocity, row, first, n);
    if (call_.old_mean) read(old, call_.old_mean, row, first, n);
    if (call_.ref_velocity) read(shift, call_.ref_velocity, row, first, n);
    for (int k = 0; k * LANES < n; ++k) {
      own[k] = v[k] - wanted[k];
      old[k] = call_.old_mean ? old[k] - wanted[k] : Float{};
      shift[k] = call_.ref_velocity ? v[k] - shift[k] : Float{};
    }
  }

  void terms(int64_t row, int64_t first, int n, Terms<MEAN_COUNT>& out) const {
    Float own[VECTORS], old[VECTORS], shift[VECTORS];
    errors(row, first, n, own, old, shift);
    const float beta = call_.beta;
    for (int k = 0; k * LANES < n; ++k) {
      out.of[SQUARE_MEAN][k] = own[k] * own[k];
      out.of[OLD_MEAN][k] = old[k] * old[k];
      out.of[CROSS_MEAN][k] = own[k] * old[k];
      out.of[PLUS_MEAN][k] = plus_error(beta, own[k], old[k]);
      out.of[MINUS_MEAN][k] = minus_error(beta, own[k], old[k]);
      out.of[SHIFT_MEAN][k] = shift[k] * shift[k];
    }
    if (call_.mask)
      for (int k = 0; k < MEAN_COUNT; ++k) apply_mask(out.of[k], call_.mask, row, first, n);
  }

  void block(int64_t row, int64_t first, int n, float count) const {
    Float own[VECTORS], old[VECTORS], shift[VECTORS];
    errors(row, first, n, own, old, shift);
    const MatchingSlopes on =
        matching_slopes(reinterpret_cast<const float*>(call_.grad_means.data) + row, call_.batch, count);
    for (int k = 0; k * LANES < n; ++k) own[k] = matching_gradient(on, own[k], old[k], shift[k]);
    if (call_.mask) apply_mask(own, call_.mask, row, first, n);
    write(call_.grad_velocity, row, first, n, own);
  }

  const Call& call_;
};

static void matching(const Call& call) { Matching(call).sums(); }
static void matching_backward(const Call& call) { Matching(call).gradient(); }

}  // namespace fastflow::FASTFLOW_ISA
