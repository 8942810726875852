// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

namespace fastflow {
namespace {

// The entry point that libgomp, libomp and libiomp5 share. Looked up instead of linked: torch wheels carry a runtime
// under different file names, and a second one in the process would bring a second pool of spinning threads.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel find_openmp() {
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (!symbol) {
    if (void* library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_LOCAL)) symbol = dlsym(library, "GOMP_parallel");
  }
  return reinterpret_cast<GompParallel>(symbol);
}

struct Job {
  int64_t items, grain;
  void (*body)(void*, int64_t, int64_t);
  void* context;
  std::atomic<int64_t> next{0};
};

void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  for (;;) {
    const int64_t begin = job.next.fetch_add(job.grain, std::memory_order_relaxed);
    if (begin >= job.items) return;
    job.body(job.context, begin, std::min(begin + job.grain, job.items));
  }
}

}  // namespace

void run_ranges(int64_t items, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  static const GompParallel parallel = find_openmp();
  const int64_t ranges = (items + grain - 1) / grain;
  const int64_t team = std::min<int64_t>(threads, ranges);
  if (team <= 1 || !parallel) {
    if (items > 0) body(context, 0, items);
    return;
  }
  Job job{items, grain, body, context};
  parallel(work, &job, static_cast<unsigned>(team), 0);
}

Scratch::Scratch(size_t bytes) : data_(nullptr) {
  data_ = std::aligned_alloc(64, (bytes + 64) / 64 * 64);  // a multiple of 64, never empty
  if (!data_) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace fastflow
