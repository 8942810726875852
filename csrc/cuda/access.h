// SPDX-License-Identifier: Apache-2.0
// Quads: four elements that follow each other, read and written at once where the call is aligned.
#pragma once

#include "../narrow.h"
#include "call.h"

namespace fastflow {

struct alignas(16) Words4 {
  uint32_t at[4];
};
struct alignas(8) Words2 {
  uint32_t at[2];
};

FASTFLOW_FN int bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Element `first` of a row. Addresses below take the offset of an element from there: 32 bits within a block's span.
FASTFLOW_FN char* row_of(const Tensor& t, int64_t row, int dtype, int64_t first = 0) {
  return t.data + (row * t.stride + first) * bytes_of(dtype);
}

// A quad as it lies in memory: float32 fills four words, the others two.
struct Quad {
  uint32_t word[4];
};

// `whole`: all four at once. Otherwise the first `left` of them, and zeros.
template <int DTYPE, class Index>
FASTFLOW_FN Quad read_as(const char* row, Index element, bool whole, int left) {
  Quad quad{};
  if constexpr (DTYPE == FLOAT32) {
    const char* from = row + element * 4;
    if (whole) {
      const Words4 words = *reinterpret_cast<const Words4*>(from);
      FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) quad.word[i] = words.at[i];
    } else {
      FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
        if (i < left) quad.word[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
  } else {
    const char* from = row + element * 2;
    if (whole) {
      const Words2 words = *reinterpret_cast<const Words2*>(from);
      quad.word[0] = words.at[0], quad.word[1] = words.at[1];
    } else {
      FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
        if (i < left) quad.word[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(from)[i]} << (i % 2 * 16);
    }
  }
  return quad;
}

template <int DTYPE, class Index>
FASTFLOW_FN Quad read_quad(int dtype, const char* row, Index element, bool whole, int left) {
  if constexpr (DTYPE != ANY) return read_as<DTYPE>(row, element, whole, left);
  if (dtype == FLOAT32) return read_as<FLOAT32>(row, element, whole, left);
  return read_as<BFLOAT16>(row, element, whole, left);  // float16 lies in memory as bfloat16 does
}

// Nothing that is made of the quad is computed before this: what stands between a read and its use covers the wait.
template <int DTYPE>
FASTFLOW_FN void hold([[maybe_unused]] Quad& quad) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(quad.word[0]), "+r"(quad.word[1]));
  if (DTYPE == FLOAT32 || DTYPE == ANY) asm volatile("" : "+r"(quad.word[2]), "+r"(quad.word[3]));
#endif
}

template <int DTYPE>
FASTFLOW_FN void widen(int dtype, const Quad& quad, float* values) {
  if (DTYPE != ANY) dtype = DTYPE;
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) {
    const uint32_t half = i % 2 ? quad.word[i / 2] >> 16 : quad.word[i / 2] & 0xFFFFu;
    values[i] = dtype == FLOAT32    ? Scalar::as_float(quad.word[i])
                : dtype == BFLOAT16 ? widen_bfloat16(half)
                                    : widen_float16(half);
  }
}

// The two quads that a thread has of a tile, at `at` from element `first` of a row on: all of them read before one is
// waited for.
template <int DTYPE, class Index>
FASTFLOW_FN void read_pair(const Tensor& t, int64_t row, int64_t first, const Index (&at)[2], bool whole,
                           const int (&left)[2], Quad (&quads)[2]) {
  const int dtype = DTYPE == ANY ? t.dtype : DTYPE;
  const char* from = row_of(t, row, dtype, first);
  FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) quads[h] = read_quad<DTYPE>(dtype, from, at[h], whole, left[h]);
}

template <int DTYPE>
FASTFLOW_FN void hold_pair(Quad (&quads)[2]) {
  FASTFLOW_UNROLL for (int h = 0; h < 2; ++h) hold<DTYPE>(quads[h]);
}

template <class Index>
FASTFLOW_FN void write_quad(int dtype, char* row, Index element, bool whole, int left, const float* values) {
  if (dtype == FLOAT32) {
    char* to = row + element * 4;
    Words4 words;
    FASTFLOW_UNROLL for (int i = 0; i < 4; ++i) words.at[i] = Scalar::as_bits(values[i]);
    if (whole)
      *reinterpret_cast<Words4*>(to) = words;
    else
      FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
        if (i < left) reinterpret_cast<uint32_t*>(to)[i] = words.at[i];
  } else {
    char* to = row + element * 2;
    Words2 words;
    FASTFLOW_UNROLL for (int i = 0; i < 2; ++i)
      words.at[i] = dtype == BFLOAT16 ? pack_bfloat16(values[2 * i], values[2 * i + 1])
                                      : pack_float16(values[2 * i], values[2 * i + 1]);
    if (whole)
      *reinterpret_cast<Words2*>(to) = words;
    else
      FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
        if (i < left) reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(words.at[i / 2] >> (i % 2 * 16));
  }
}

// What a slot of `dtype` keeps of a value.
FASTFLOW_FN float stored(int dtype, float x) {
  if (dtype == FLOAT32) return x;
  if (dtype == BFLOAT16) return widen_bfloat16(pack_bfloat16(x, 0.0f) & 0xFFFFu);
  return widen_float16(pack_float16(x, 0.0f) & 0xFFFFu);
}

FASTFLOW_FN const char* mask_of(const Tensor& mask, int64_t row, int64_t element) {
  return mask.data + row * mask.stride + element;
}

// The mask of a quad, a byte per element; bytes that are not there are 0.
FASTFLOW_FN uint32_t read_mask(const char* from, bool whole, int left) {
  if (whole) return *reinterpret_cast<const uint32_t*>(from);
  uint32_t bytes = 0;
  FASTFLOW_UNROLL for (int i = 0; i < 4; ++i)
    if (i < left) bytes |= uint32_t{reinterpret_cast<const uint8_t*>(from)[i]} << (8 * i);
  return bytes;
}

}  // namespace fastflow
