// SPDX-License-Identifier: Apache-2.0
// Storage types: float32, and bfloat16 and float16 rounded to nearest even. The integer forms below give the bits of
// the F16C instructions, NaN included (payload kept, made quiet); a bfloat16 NaN is stored as 0x7FC0.
#pragma once

#include "call.h"
#include "vector.h"

namespace fastflow::FASTFLOW_ISA {

typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
using Bits = Vector::Bits;

struct Float32 {
  using Element = float;
  using Packed = Float;
  FASTFLOW_FN Float widen(Packed x) { return x; }
  FASTFLOW_FN Packed narrow(Float x) { return x; }
  FASTFLOW_FN Float round(Float x) { return x; }
};

struct BFloat16 {
  using Element = uint16_t;
  using Packed = Halves;
  FASTFLOW_FN Bits rounded(Float x) {  // in the high half of each lane; the low half is junk
    const Bits bits = Vector::as_bits(x);
    const Bits nearest = bits + (((bits >> 16) & 1u) + 0x7FFFu);
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? Bits{} + 0x7FC00000u : nearest;
  }
  FASTFLOW_FN Float widen(Packed x) { return (Float)(__builtin_convertvector(x, Bits) << 16); }
  FASTFLOW_FN Packed narrow(Float x) { return __builtin_convertvector(rounded(x) >> 16, Packed); }
  FASTFLOW_FN Float round(Float x) { return (Float)(rounded(x) & 0xFFFF0000u); }
};

struct Float16 {
  using Element = uint16_t;
  using Packed = Halves;
#if defined(__AVX512F__)
  FASTFLOW_FN Float widen(Packed x) { return (Float)_mm512_cvtph_ps((__m256i)x); }
  FASTFLOW_FN Packed narrow(Float x) { return (Packed)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
  FASTFLOW_FN Float widen(Packed x) { return (Float)_mm256_cvtph_ps((__m128i)x); }
  FASTFLOW_FN Packed narrow(Float x) { return (Packed)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
  FASTFLOW_FN Float widen(Packed packed) {
    const Bits half = __builtin_convertvector(packed, Bits), magnitude = half & 0x7FFFu;
    const Bits normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) + (224u << 23);
    const Bits quiet = magnitude > 0x7C00u ? special | 0x400000u : special;
    const Bits subnormal = (Bits)(Vector::to_float((Vector::Int)magnitude) * 0x1p-24f);
    const Bits finite = magnitude < 0x400u ? subnormal : normal;
    return (Float)((magnitude < 0x7C00u ? finite : quiet) | ((half & 0x8000u) << 16));
  }
  FASTFLOW_FN Packed narrow(Float x) {
    const Bits bits = Vector::as_bits(x), magnitude = bits & 0x7FFFFFFFu;
    const Bits normal = ((magnitude + (((magnitude >> 13) & 1u) + 0xFFFu)) >> 13) - (112u << 10);
    // One unit of 0.5 is one unit of a subnormal half, so this sum rounds it.
    const Bits subnormal = Vector::as_bits(Vector::as_float(magnitude) + 0.5f) - 0x3F000000u;
    const Bits finite = magnitude < 0x38800000u ? subnormal : (normal > 0x7C00u ? Bits{} + 0x7C00u : normal);
    const Bits nan = ((magnitude >> 13) & 0x3FFu) | 0x7E00u;
    return __builtin_convertvector((magnitude > 0x7F800000u ? nan : finite) | ((bits >> 16) & 0x8000u), Packed);
  }
#endif
  FASTFLOW_FN Float round(Float x) { return widen(narrow(x)); }
};

// body(type) with the storage type of a dtype.
template <class Body>
FASTFLOW_FN void visit(int dtype, Body&& body) {
  if (dtype == FLOAT32)
    body(Float32());
  else if (dtype == BFLOAT16)
    body(BFloat16());
  else
    body(Float16());
}

// LANES elements from p, or the first n and zeros.
template <class T, class Whole>
FASTFLOW_FN Float load(const void* p, int i, int n, Whole) {
  typename T::Packed x{};
  const char* from = static_cast<const char*>(p) + i * static_cast<int>(sizeof(typename T::Element));
  if constexpr (Whole::value)
    memcpy(&x, from, sizeof x);
  else
    memcpy(&x, from, (n - i) * sizeof(typename T::Element));
  return T::widen(x);
}

template <class T, class Whole>
FASTFLOW_FN void store(void* p, int i, int n, Float x, Whole) {
  const typename T::Packed packed = T::narrow(x);
  char* to = static_cast<char*>(p) + i * static_cast<int>(sizeof(typename T::Element));
  if constexpr (Whole::value)
    memcpy(to, &packed, sizeof packed);
  else
    memcpy(to, &packed, (n - i) * sizeof(typename T::Element));
}

}  // namespace fastflow::FASTFLOW_ISA
