// SPDX-License-Identifier: Apache-2.0
// What the binding calls. Errors are codes of the CUDA runtime, 0 for none.
#pragma once

#include "../policy.h"
#include "call.h"

namespace fastflow {

struct Stream {
  int device;
  void* handle;
};

int64_t scratch_words_of(bool backward, int64_t batch, int64_t numel, int64_t groups, bool clamp, bool means);
int64_t matching_words_of(int64_t batch, int64_t numel);
int step_on(const Call& call, float* scratch, Stream stream);
int log_prob_backward_on(const Call& call, float* scratch, Stream stream);
int matching_on(const Call& call, float* scratch, Stream stream);
int matching_backward_on(const Call& call, float* scratch, Stream stream);
int policy_rows_on(const PolicyCall& call, Stream stream);

// Loads a kernel on a device: 0 if the module holds code that it can run.
int load_on(int device);
const char* error_text(int error);
const char* architectures();  // what the module was compiled for

}  // namespace fastflow
