// SPDX-License-Identifier: Apache-2.0
// A block is the piece of a row that stays in L1 while it goes through the stages of a step: read, draw, write.
#pragma once

#include "../normal.h"
#include "../philox.h"
#include "../transition.h"
#include "call.h"
#include "convert.h"

namespace fastflow::FASTFLOW_ISA {

constexpr int TILE = 2048;  // elements of a partial sum: part of the numerical contract
constexpr int BLOCK = 512;  // divides TILE; the arrays of a block fill 8-10 KB
constexpr int VECTORS = BLOCK / LANES;

// The scalars of one row.
struct RowScalars {
  float a, b, std, p, q, ode_a, ode_b, c0, w, scale;

  RowScalars(const Call& call, int64_t row) {
    const float* t = reinterpret_cast<const float*>(call.coef.data) + row * call.coef.stride;
    a = t[A], b = t[B], std = t[STD], p = t[P], q = t[Q], ode_a = t[ODE_A], ode_b = t[ODE_B];
    c0 = call.score == GAUSSIAN ? t[C0] : 0.0f;
    w = call.score == SQUARE ? 1.0f : t[W];
    scale = call.scale ? reinterpret_cast<const float*>(call.scale.data)[row * call.scale.stride] : 1.0f;
  }
};

FASTFLOW_FN char* address(const Tensor& t, int64_t row, int64_t first) {
  return t.data + (row * t.stride + first) * (t.dtype == FLOAT32 ? 4 : 2);
}

// Asks for a block of a row that will be read soon; the address need not be inside the tensor.
FASTFLOW_FN void prefetch(const Tensor& t, int64_t row, int64_t first) {
  if (!t) return;
  const char* from = address(t, row, first);
  const int bytes = BLOCK * (t.dtype == FLOAT32 ? 4 : 2);
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// Whether n elements at `to` can be written past the cache.
FASTFLOW_FN bool streams(const Tensor& t, const char* to, int n) {
  return t.dtype == FLOAT32 && reinterpret_cast<uintptr_t>(to) % sizeof(Float) == 0 && n % LANES == 0;
}

FASTFLOW_FN void read(Float* out, const Tensor& t, int64_t row, int64_t first, int n) {
  const char* from = address(t, row, first);
  visit(t.dtype, [&](auto type) {
    each_vector(n, [&](int i, auto whole) { out[i / LANES] = load<decltype(type)>(from, i, n, whole); });
  });
}

// The reference network's call, seen as a call of its own: what reads or rescales a velocity serves it too.
FASTFLOW_FN Call reference_of(const Call& call) {
  Call reference = call;
  reference.velocity = call.ref_velocity;
  reference.uncond = call.ref_velocity ? call.ref_uncond : Tensor();
  reference.rows = Tensor();
  return reference;
}

FASTFLOW_FN void read_combined(Float* out, const Call& call, float scale, int64_t row, int64_t first, int n) {
  row = source_row(call, row);
  if (!call.uncond) return read(out, call.velocity, row, first, n);
  const char *v = address(call.velocity, row, first), *u = address(call.uncond, row, first);
  visit(call.velocity.dtype, [&](auto type) {
    using T = decltype(type);
    each_vector(n, [&](int i, auto whole) {
      out[i / LANES] = combine(load<T>(v, i, n, whole), load<T>(u, i, n, whole), scale);
    });
  });
}

// `past`: past the cache, where the address allows it.
FASTFLOW_FN void write(const Tensor& t, int64_t row, int64_t first, int n, const Float* values, bool past = false) {
  char* to = address(t, row, first);
  if (past && streams(t, to, n)) {
    for (int k = 0; k * LANES < n; ++k) Vector::stream(to + k * sizeof(Float), values[k]);
    return;
  }
  visit(t.dtype, [&](auto type) {
    each_vector(n, [&](int i, auto whole) { store<decltype(type)>(to, i, n, values[i / LANES], whole); });
  });
}

FASTFLOW_FN void write_affine(const Tensor& t, int64_t row, int64_t first, int n, float on_x, const Float* x, float on_v,
                              const Float* v, bool past) {
  char* to = address(t, row, first);
  if (past && streams(t, to, n)) {
    for (int k = 0; k * LANES < n; ++k) Vector::stream(to + k * sizeof(Float), affine(on_x, x[k], on_v, v[k]));
    return;
  }
  visit(t.dtype, [&](auto type) {
    each_vector(n, [&](int i, auto whole) {
      store<decltype(type)>(to, i, n, affine(on_x, x[i / LANES], on_v, v[i / LANES]), whole);
    });
  });
}

// Standard normal draws for elements 4q, 4q + 1, ...; fills whole groups of 8 vectors, BLOCK elements at most. The four
// chains of a group are independent: interleaved by -fschedule-insns they take half the time of one after another.
static __attribute__((noinline)) void draw(Float* z, int n, uint64_t q, PhiloxKey key, uint32_t step, uint32_t stream) {
  using Word = Vector::Word;
  constexpr int CHAINS = 4;
  static_assert(BLOCK % (CHAINS * 2 * LANES) == 0, "a group of chains must fit a block");
  Word quad;
  for (int i = 0; i < LANES / 2; ++i) quad[i] = q + i;
  for (int k = 0; k * LANES < n; k += 2 * CHAINS) {
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; ++chain) {
      Word words[4] = {quad, quad >> 32, Word{} + step, Word{} + stream};
      philox4x32<Vector>(words, key);
      Float even, odd;  // z0 z2 z4 ..., z1 z3 z5 ...
      box_muller<Vector>(Vector::pair(words[0], words[2]), Vector::pair(words[1], words[3]), even, odd);
      Vector::interleave(even, odd, z[k + 2 * chain], z[k + 2 * chain + 1]);
      quad = quad + static_cast<uint64_t>(LANES / 2);
    }
  }
}

// square[i] = (next - mean)^2 with next rounded to `dtype` first.
FASTFLOW_FN void squares(Float* square, int dtype, const Float* next, const Float* mean, int n) {
  visit(dtype, [&](auto type) {
    for (int k = 0; k * LANES < n; ++k) {
      const Float r = decltype(type)::round(next[k]) - mean[k];
      square[k] = r * r;
    }
  });
}

// values[i] = 0 where the mask is false.
FASTFLOW_FN void apply_mask(Float* values, const Tensor& mask, int64_t row, int64_t first, int n) {
  const char* keep = mask.data + row * mask.stride + first;
  each_vector(n, [&](int i, auto whole) {
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    Bytes bytes{};
    memcpy(&bytes, keep + i, decltype(whole)::value ? LANES : n - i);
    values[i / LANES] = __builtin_convertvector(bytes, Vector::Int) != 0 ? values[i / LANES] : Float{};
  });
}

FASTFLOW_FN int count_mask(const Tensor& mask, int64_t row, int64_t first, int n) {
  const char* keep = mask.data + row * mask.stride + first;
  int count = 0;
  for (int i = 0; i < n; ++i) count += keep[i] != 0;
  return count;
}

FASTFLOW_FN bool all_finite(const Float* values, int n) {
  Vector::Int bad{};
  for (int k = 0; k * LANES < n; ++k) bad |= (Vector::as_bits(values[k]) & 0x7F800000u) == 0x7F800000u;
  int any = 0;
  for (int i = 0; i < LANES; ++i) any |= bad[i];
  return any == 0;
}

FASTFLOW_FN void clear_tail(Float* values, int n) {
  for (int i = n; i % LANES; ++i) values[i / LANES][i % LANES] = 0.0f;
}

// The tree sum of n <= size elements, zero beyond n up to a whole vector: fold halves from the smallest power of two
// that holds them. The zeros that a fold from `size` would have added change nothing but the sign of a zero: hence + 0.
FASTFLOW_FN float fold(Float* values, int n) {
  int vectors = 1;
  while (vectors * LANES < n) vectors *= 2;
  for (int k = (n + LANES - 1) / LANES; k < vectors; ++k) values[k] = Float{};
  for (int half = vectors / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) values[k] = values[k] + values[k + half];
  return Vector::fold(values[0]) + 0.0f;
}

}  // namespace fastflow::FASTFLOW_ISA
