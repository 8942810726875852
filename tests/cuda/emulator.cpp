// SPDX-License-Identifier: Apache-2.0
// The CUDA programs on a CPU: blocks one after another, phases in order, the threads of a phase in a loop, in either
// direction: a program whose threads meet elsewhere than between phases gives other bits in one of them.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/plan.h"

namespace fastflow {
namespace {

// Set through the stream's handle: bit 0 turns the threads around, bit 1 the blocks.
class Emulator {
 public:
  explicit Emulator(Stream stream) : order_(reinterpret_cast<uintptr_t>(stream.handle)) {}

  template <class Program>
  int run(const typename CalledWith<Program>::Type& call, int64_t blocks) {
    using Shared = typename Program::Shared;
    const std::unique_ptr<Shared> shared(new Shared);
    for (int64_t i = 0; i < blocks; ++i) {
      const uint32_t block = static_cast<uint32_t>(order_ & 2 ? blocks - 1 - i : i);
      std::memset(static_cast<void*>(shared.get()), 0xFF, sizeof(Shared));  // NaN
      const int64_t rounds = Program::rounds(call, block);
      for (int64_t round = 0; round < rounds; ++round) phases<Program, 0>(call, block, round, *shared);
    }
    return 0;
  }

 private:
  template <class Program, int PHASE>
  void phases(const typename CalledWith<Program>::Type& call, uint32_t block, int64_t round,
              typename Program::Shared& shared) {
    const int threads = PHASE >= Program::FIRST_OF_ONE_WARP ? 32 : THREADS;
    for (int i = 0; i < threads; ++i)
      Program::template phase<PHASE>(call, block, order_ & 1 ? threads - 1 - i : i, round, shared);
    if constexpr (PHASE + 1 < Program::PHASES)
      if (PHASE > 0 || !Program::ends(call)) phases<Program, PHASE + 1>(call, block, round, shared);
  }

  uintptr_t order_;
};

}  // namespace

int64_t scratch_words_of(bool backward, int64_t batch, int64_t numel, int64_t groups, bool clamp, bool means) {
  return scratch_words(backward, batch, numel, groups, clamp, means);
}

int64_t matching_words_of(int64_t batch, int64_t numel) { return matching_words(batch, numel); }

int step_on(const Call& call, float* scratch, Stream stream) {
  Emulator emulator(stream);
  return run_step(call, scratch, emulator);
}

int log_prob_backward_on(const Call& call, float* scratch, Stream stream) {
  Emulator emulator(stream);
  return run_log_prob_backward(call, scratch, emulator);
}

int matching_on(const Call& call, float* scratch, Stream stream) {
  Emulator emulator(stream);
  return run_matching(call, scratch, emulator);
}

int matching_backward_on(const Call& call, float* scratch, Stream stream) {
  Emulator emulator(stream);
  return run_matching_backward(call, scratch, emulator);
}

int policy_rows_on(const PolicyCall& call, Stream stream) {
  Emulator emulator(stream);
  return emulator.run<PolicyRows>(call, 1);
}

int load_on(int) { return 0; }
const char* error_text(int) { return "the emulator has no errors"; }
const char* architectures() { return "emulator"; }

}  // namespace fastflow

// The functions that say where things are, for sizes that no test can allocate.
#define FASTFLOW_EXPORT extern "C" __attribute__((visibility("default")))

FASTFLOW_EXPORT int64_t fastflow_blocks(int64_t batch, int64_t numel) {
  return fastflow::row_geometry(batch, numel).blocks;
}

FASTFLOW_EXPORT void fastflow_place(int64_t batch, int64_t numel, uint32_t block, int thread, int64_t* out) {
  const fastflow::Geometry geometry = fastflow::row_geometry(batch, numel);
  const fastflow::Place general = fastflow::place_of<true>(geometry, block, thread);
  const fastflow::Place at = geometry.log_team == 8 ? fastflow::place_of<false>(geometry, block, thread) : general;
  const int64_t values[] = {at.row, at.tile, at.tiles, at.lane, at.team, at.slot, general.row, general.tile};
  std::copy(std::begin(values), std::end(values), out);
}

FASTFLOW_EXPORT int64_t fastflow_quotient(int64_t n, int64_t divisor) { return fastflow::Divisor(divisor).quotient(n); }

FASTFLOW_EXPORT int64_t fastflow_offset(int64_t stride, int64_t row, int64_t first, int dtype) {
  fastflow::Tensor t;
  t.stride = stride;
  return reinterpret_cast<intptr_t>(fastflow::row_of(t, row, dtype, first));
}
