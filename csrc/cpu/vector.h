// SPDX-License-Identifier: Apache-2.0
// One register of floats as a lane type. FASTFLOW_ISA names the namespace of this instruction set; everything that is
// compiled with its flags lives there, so that the linker can never hand it to another set.
#pragma once

#include <utility>

#include "../lane.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastflow::FASTFLOW_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

struct Vector {
  typedef float Float __attribute__((vector_size(LANES * 4)));
  typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
  typedef int32_t Int __attribute__((vector_size(LANES * 4)));
  typedef uint64_t Word __attribute__((vector_size(LANES * 4)));

  FASTFLOW_FN Bits as_bits(Float x) { return (Bits)x; }
  FASTFLOW_FN Float as_float(Bits bits) { return (Float)bits; }
  FASTFLOW_FN Int as_int(Bits bits) { return (Int)bits; }
  FASTFLOW_FN Float to_float(Int x) { return __builtin_convertvector(x, Float); }

#if defined(__AVX512F__)
  FASTFLOW_FN Float root(Float x) { return (Float)_mm512_sqrt_ps((__m512)x); }
  FASTFLOW_FN Word multiply(Word x, uint32_t m) { return (Word)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m)); }
  FASTFLOW_FN void stream(char* to, Float x) { _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)x); }
#elif defined(__AVX2__)
  FASTFLOW_FN Float root(Float x) { return (Float)_mm256_sqrt_ps((__m256)x); }
  FASTFLOW_FN Word multiply(Word x, uint32_t m) { return (Word)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m)); }
  FASTFLOW_FN void stream(char* to, Float x) { _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)x); }
#elif defined(__SSE2__)
  FASTFLOW_FN Float root(Float x) { return (Float)_mm_sqrt_ps((__m128)x); }
  FASTFLOW_FN Word multiply(Word x, uint32_t m) { return (Word)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(m)); }
  FASTFLOW_FN void stream(char* to, Float x) { _mm_stream_ps(reinterpret_cast<float*>(to), (__m128)x); }
#else
  FASTFLOW_FN Float root(Float x) {
    for (int i = 0; i < LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
  }
  FASTFLOW_FN Word multiply(Word x, uint32_t m) { return (x & 0xFFFFFFFFu) * static_cast<uint64_t>(m); }
  FASTFLOW_FN void stream(char* to, Float x) { memcpy(to, &x, sizeof x); }
#endif

  // After `stream`, before another thread reads: puts the writes in order.
  FASTFLOW_FN void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
  }

  // Low words of `even` in the even lanes, of `odd` in the odd lanes (little endian).
  FASTFLOW_FN Bits pair(Word even, Word odd) { return (Bits)((even & 0xFFFFFFFFu) | (odd << 32)); }

  // e0 o0 e1 o1 ... in two registers.
  FASTFLOW_FN void interleave(Float even, Float odd, Float& low, Float& high) {
    low = interleave_from<0>(even, odd, Lanes());
    high = interleave_from<LANES / 2>(even, odd, Lanes());
  }

  // Lane i + lane i + HALF for HALF = LANES/2, ..., 1: the end of a fold. The sum is in lane 0.
  template <int HALF = LANES / 2>
  FASTFLOW_FN float fold(Float x) {
    if constexpr (HALF == 0)
      return x[0];
    else
      return fold<HALF / 2>(x + rotate<HALF>(x, Lanes()));
  }

 private:
  using Lanes = std::make_integer_sequence<int, LANES>;

  template <int... FROM>
  FASTFLOW_FN Float shuffle(Float a, Float b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, FROM...);
#else
    return __builtin_shuffle(a, b, Int{FROM...});
#endif
  }
  template <int START, int... I>
  FASTFLOW_FN Float interleave_from(Float even, Float odd, std::integer_sequence<int, I...>) {
    return shuffle<(START + I / 2 + I % 2 * LANES)...>(even, odd);
  }
  template <int BY, int... I>
  FASTFLOW_FN Float rotate(Float x, std::integer_sequence<int, I...>) {
    return shuffle<((I + BY) % LANES)...>(x, x);
  }
};

using Float = Vector::Float;

// f(i, full) over i = 0, LANES, ... < n: `full` is std::true_type-like where LANES elements are left.
struct Full {
  static constexpr bool value = true;
};
struct Part {
  static constexpr bool value = false;
};
template <class Body>
FASTFLOW_FN void each_vector(int n, Body&& body) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) body(i, Full());
  if (i < n) body(i, Part());
}

}  // namespace fastflow::FASTFLOW_ISA
