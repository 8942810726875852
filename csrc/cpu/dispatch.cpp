// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastflow {

namespace baseline {
extern const Kernels kernels;
}

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

namespace {

// Register state that the system saves: bits 1-2 SSE and AVX, bits 5-7 AVX-512.
uint64_t enabled_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

struct Features {
  bool avx2 = false, avx512 = false;

  Features() {
    unsigned a, b, c, d;
    const unsigned base = bit_OSXSAVE | bit_AVX | bit_F16C;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & base) != base) return;
    const uint64_t state = enabled_state();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    avx2 = (state & 0x06) == 0x06 && (b & bit_AVX2);
    avx512 = avx2 && (state & 0xE6) == 0xE6 && (b & wide) == wide;
  }
};

}  // namespace
#endif

const std::vector<const Kernels*>& supported_kernels() {
  static const std::vector<const Kernels*> kernels = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    const Features features;
    if (features.avx512) found.push_back(&avx512::kernels);
    if (features.avx2) found.push_back(&avx2::kernels);
#endif
    found.push_back(&baseline::kernels);
    return found;
  }();
  return kernels;
}

}  // namespace fastflow
