// SPDX-License-Identifier: Apache-2.0
#include "policy.h"

namespace fastflow {

void policy(const PolicyCall& call) {
  double rows = 0.0, all[POLICY_INFO], own[POLICY_INFO];
  for (int64_t row = 0; row < call.batch; ++row) rows += policy_counts(call, row);
  if (rows == 0.0) rows = 1.0;
  for (int k = 0; k < POLICY_INFO; ++k) all[k] = policy_start(k);
  for (int64_t row = 0; row < call.batch; ++row) {
    finish_policy_row(call, row, rows, own);
    for (int k = 0; k < POLICY_INFO; ++k) all[k] = policy_join(k, all[k], own[k]);
  }
  for (int k = 0; k < POLICY_INFO; ++k) call.info[k] = policy_info(k, all[k], rows);
}

}  // namespace fastflow
