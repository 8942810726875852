// SPDX-License-Identifier: Apache-2.0
// Threads and scratch memory. No instruction set of its own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastflow {

// body(context, begin, end) over disjoint ranges that cover [0, items), on up to `threads` threads of the OpenMP
// runtime that this process already has (torch's). Ranges are handed out as threads become free: results must not
// depend on them.
void run_ranges(int64_t items, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context);

// Memory that is not initialised, 64-byte aligned. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace fastflow
