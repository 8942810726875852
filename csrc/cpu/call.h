// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../arguments.h"

namespace fastflow {

struct Call : Arguments {
  int threads;
};

// The same kernels, compiled once per instruction set.
struct Kernels {
  const char* name;
  void (*step)(const Call&);
  void (*log_prob_backward)(const Call&);
  void (*matching)(const Call&);
  void (*matching_backward)(const Call&);
};

}  // namespace fastflow
