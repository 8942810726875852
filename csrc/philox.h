// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// fastflow/philox.py is the definition.
#pragma once

#include "lane.h"

namespace fastflow {

struct PhiloxKey {
  uint32_t low, high;
};

FASTFLOW_FN PhiloxKey philox_key(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// Ten rounds over c[0..3] in place. A word sits in the low half of a 64-bit lane and the high half is never read, so a
// product is its own low word and costs no masking.
template <class L>
FASTFLOW_FN void philox4x32(typename L::Word (&c)[4], PhiloxKey key) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const typename L::Word p0 = L::multiply(c[0], 0xD2511F53u), p1 = L::multiply(c[2], 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ static_cast<uint64_t>(key.low);
    c[2] = (p0 >> 32) ^ c[3] ^ static_cast<uint64_t>(key.high);
    c[1] = p1;
    c[3] = p0;
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

}  // namespace fastflow
