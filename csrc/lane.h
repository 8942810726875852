// SPDX-License-Identifier: Apache-2.0
// A lane type says what the element formulas run on. `Scalar` is one element, for CUDA and for plain loops; `Vector`
// (cpu/vector.h) is one register. Formulas use +, -, *, ?:, shifts and the functions below, nothing else, so both give
// the same bits. Compile without contraction: g++ -ffp-contract=off, nvcc -fmad=false.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTFLOW_FN static __host__ __device__ __forceinline__
#define FASTFLOW_METHOD __host__ __device__ __forceinline__
#else
#define FASTFLOW_FN static inline __attribute__((always_inline))
#define FASTFLOW_METHOD inline __attribute__((always_inline))
#endif

namespace fastflow {

struct Scalar {
  using Float = float;
  using Bits = uint32_t;
  using Int = int32_t;
  using Word = uint64_t;  // a counter word; only the low 32 bits count

  FASTFLOW_FN Bits as_bits(Float x) {
    Bits bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
  }
  FASTFLOW_FN Float as_float(Bits bits) {
    Float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  FASTFLOW_FN Int as_int(Bits bits) { return static_cast<Int>(bits); }
  FASTFLOW_FN Float to_float(Int x) { return static_cast<Float>(x); }
  FASTFLOW_FN Float root(Float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
  }
  // 32 x 32 -> 64 bits
  FASTFLOW_FN Word multiply(Word x, uint32_t m) { return static_cast<Word>(static_cast<uint32_t>(x)) * m; }
};

}  // namespace fastflow
