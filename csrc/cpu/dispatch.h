// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "call.h"

namespace fastflow {

// The compiled instruction sets that this machine and its system support, best first.
const std::vector<const Kernels*>& supported_kernels();

}  // namespace fastflow
