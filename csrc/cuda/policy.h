// SPDX-License-Identifier: Apache-2.0
// The rows of a policy loss, on one block: a thread finishes a row, and one thread for each number of the batch's info
// adds what the rows give to it, in their order. So the result is that of a loop over the rows.
#pragma once

#include "../policy.h"
#include "call.h"

namespace fastflow {

struct PolicyRows;

template <>
struct CalledWith<PolicyRows> {
  using Type = PolicyCall;
};

struct PolicyRows {
  static constexpr int PHASES = 4, FIRST_OF_ONE_WARP = PHASES, BLOCKS = 1;
  static_assert(POLICY_INFO * 32 <= THREADS, "a warp for each number");

  struct Shared {
    double own[POLICY_INFO][THREADS], all[POLICY_INFO];
    int64_t counts[THREADS];
    double rows;  // that count, or 1
  };

  FASTFLOW_FN bool ends(const PolicyCall&) { return false; }
  FASTFLOW_FN int64_t rounds(const PolicyCall& call, uint32_t) {
    return call.batch > 0 ? (call.batch + THREADS - 1) / THREADS : 1;
  }

  template <int PHASE>
  FASTFLOW_FN void phase(const PolicyCall& call, uint32_t, int thread, int64_t round, Shared& shared) {
    const int64_t first = round * THREADS, left = call.batch - first;
    const int count = static_cast<int>(left < THREADS ? left : THREADS);
    if constexpr (PHASE == 0) {
      if (round > 0) return;
      int64_t counts = 0;
      for (int64_t row = thread; row < call.batch; row += THREADS) counts += policy_counts(call, row);
      shared.counts[thread] = counts;
    } else if constexpr (PHASE == 1) {
      if (round > 0 || thread > 0) return;
      int64_t sum = 0;
      for (int i = 0; i < count; ++i) sum += shared.counts[i];
      shared.rows = sum > 0 ? static_cast<double>(sum) : 1.0;
    } else if constexpr (PHASE == 2) {
      if (thread >= count) return;
      double own[POLICY_INFO];
      finish_policy_row(call, first + thread, shared.rows, own);
      FASTFLOW_UNROLL for (int k = 0; k < POLICY_INFO; ++k) shared.own[k][thread] = own[k];
    } else {
      const int k = thread / 32;
      if (thread % 32 || k >= POLICY_INFO) return;
      double all = round ? shared.all[k] : policy_start(k);
#if defined(__CUDACC__)
#pragma unroll 8
#endif
      for (int i = 0; i < count; ++i) all = policy_join(k, all, shared.own[k][i]);
      shared.all[k] = all;
      if (left <= THREADS) call.info[k] = policy_info(k, all, shared.rows);
    }
  }
};

}  // namespace fastflow
