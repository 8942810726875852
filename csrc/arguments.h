// SPDX-License-Identifier: Apache-2.0
// What a compiled module is called with, as plain data. Mirrors StepCall of fastflow/backends/base.py; the order of the
// tensors in a call is that of `read_arguments` in reader.h.
#pragma once

#include "transition.h"

namespace fastflow {

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };

// Rows of a tensor: row r starts at data + r * stride elements and is contiguous. data == nullptr: absent.
struct Tensor {
  char* data = nullptr;
  int64_t stride = 0;  // elements; 0 gives every row the same values
  int dtype = FLOAT32;
  FASTFLOW_METHOD explicit operator bool() const { return data != nullptr; }
};

struct Arguments {
  int64_t batch, numel;
  Tensor sample, velocity, uncond;                             // [B, N]; uncond has velocity's dtype
  Tensor coef, scale;                                          // float32 [1 or B, 16], [1 or B]
  Tensor noise, seeds, step, given, mask;                      // [B, N], int64 [B], int64 [1 or B], [B, N], bool [B, N]
  Tensor ref_velocity, ref_uncond, old_mean;                   // [B, N]; ref_uncond has ref_velocity's dtype
  Tensor rows;                                                 // int64 [B]: see source_row; absent: a row is its own
  Tensor next_sample, log_prob, clean, ode_next, mean, flags;  // outputs; flags int32 [B], of Flag
  Tensor shift, drift;  // float32 [B]: means of (velocity - ref_velocity)^2, guided, and of (mean - old_mean)^2
  Tensor grad, grad_shift, grad_drift;  // backward: float32 [B] (the first one [B, N] under reduce NONE)
  Tensor grad_velocity, grad_uncond;    // [B, N] out
  Tensor means, grad_means;             // of a matching loss: float32 [6, B] out, [3, B] in
  int64_t sources;                      // rows of sample, velocity and uncond, where `rows` is there
  int rescale;
  int64_t outer, channels, inner;  // a row as [outer, channels, inner]; a token's norm runs over channels
  uint32_t stream;
  int64_t offset;  // of a row's first element in the noise; a multiple of 4
  int score, reduce, score_rounded, next_dtype;
  float beta;  // of a matching loss
};

enum Flag { NOT_FINITE = 1, NO_SOURCE = 2 };  // NO_SOURCE: `rows` named a row that is not there

FASTFLOW_FN float float_at(const Tensor& t, int64_t row) {
  return reinterpret_cast<const float*>(t.data)[row * t.stride];
}
FASTFLOW_FN int64_t int64_at(const Tensor& t, int64_t row) {
  return reinterpret_cast<const int64_t*>(t.data)[row * t.stride];
}

// The row of sample, velocity and uncond that a row is made of, the nearest one where the index names none.
FASTFLOW_FN int64_t source_row(const Arguments& call, int64_t row) {
  if (!call.rows) return row;
  const int64_t source = int64_at(call.rows, row);
  return source < 0 ? 0 : source < call.sources ? source : call.sources - 1;
}

FASTFLOW_FN int flags_of(const Arguments& call, int64_t row, bool bad) {
  const bool lost = call.rows && int64_at(call.rows, row) != source_row(call, row);
  return (bad ? NOT_FINITE : 0) | (lost ? NO_SOURCE : 0);
}

}  // namespace fastflow
