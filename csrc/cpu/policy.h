// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../policy.h"

namespace fastflow {

void policy(const PolicyCall& call);

}  // namespace fastflow
