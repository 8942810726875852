// SPDX-License-Identifier: Apache-2.0
// One call as plain data, passed by value to every kernel of it.
#pragma once

#include "../arguments.h"

#if defined(__CUDACC__)
#define FASTFLOW_UNROLL _Pragma("unroll")
#else
#define FASTFLOW_UNROLL
#endif

namespace fastflow {

constexpr int ANY = FLOAT16 + 1;  // a dtype that is known at run time only

constexpr int TILE = 2048;      // elements of a partial sum: part of the numerical contract
constexpr int THREADS = 256;    // of a block
constexpr int ELEMENTS = 8;     // of a tile, per thread: a quad in each half
constexpr int WHOLE_TILES = 4;  // a row of up to this many tiles is finished by the block that steps it

// n / divisor as a multiplication (Granlund and Montgomery, "Division by invariant integers using multiplication",
// PLDI 1994): with 2^log >= divisor, the factor ceil(2^(bits + log) / divisor) is exact for all n < 2^bits.
struct Divisor {
  int64_t divisor = 1;
  uint64_t wide = 0;  // bits = 62
  uint32_t factor = 1u << 31;  // bits = 31
  int log = 0, wide_log = 2;

  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(by) {
    if (by <= 1) return;
    while ((uint64_t{1} << log) < static_cast<uint64_t>(by)) ++log;
    wide_log = log > 2 ? log : 2;
    using Wide = unsigned __int128;
    wide = static_cast<uint64_t>(((Wide{1} << (62 + wide_log)) + by - 1) / by);
    if (log <= 31) factor = static_cast<uint32_t>(((Wide{1} << (31 + log)) + by - 1) / by);
  }
  FASTFLOW_METHOD uint32_t small_quotient(uint32_t n) const {  // both below 2^31
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * factor) >> (31 + log));
  }
  FASTFLOW_METHOD int64_t quotient(int64_t n) const {
    if ((n | divisor) < int64_t{1} << 31) return small_quotient(static_cast<uint32_t>(n));
    if (divisor == 1) return n;
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(static_cast<uint64_t>(n), wide);
#else
    const uint64_t high = static_cast<uint64_t>((static_cast<unsigned __int128>(n) * wide) >> 64);
#endif
    return static_cast<int64_t>(high >> (wide_log - 2));
  }
};

// How rows are dealt to blocks. No result depends on it.
struct Geometry {
  int64_t tiles = 0;          // of a row
  int span = 1;               // tiles of a row that one block takes
  int log_team = 8;           // log2 of the threads that share a row: fewer than a block where rows are short
  Divisor spans;              // blocks of a row
  int64_t blocks = 0;
};

struct Call : Arguments {
  // What the host derives: plan.h.
  Geometry geometry;
  bool reduces, marked;  // a row's score is summed; tiles leave marks
  bool compared;         // shift and drift come with the score, in one pass
  int quad;             // elements that a row must have left for its quads to be read and written at once
  int64_t groups;       // rescaled groups of a row: tokens, or 1 under clamp
  Divisor by_slab, by_inner;  // of a token's group: see group_of
  float* sums;          // [3 or 6][batch * tiles] partial sums
  uint32_t* marks;      // [batch * tiles] elements that are scored, with BAD
  float *factors, *ref_factors, *on_guided, *on_velocity;  // [batch * groups]
  float* counts;        // [batch] elements that are scored
};

// What a program is called with.
template <class Program>
struct CalledWith {
  using Type = Call;
};

constexpr uint32_t BAD = 1u << 31;  // a value that is not finite

}  // namespace fastflow
