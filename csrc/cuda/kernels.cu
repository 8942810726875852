// SPDX-License-Identifier: Apache-2.0
// The programs as CUDA kernels. Compile without contraction: fastflow/_nvcc.py holds the flags.
#include <atomic>

#include "kernels.h"
#include "plan.h"

#if !defined(FASTFLOW_ARCHS)
#define FASTFLOW_ARCHS unknown
#endif
#define FASTFLOW_TEXT_OF(x) #x
#define FASTFLOW_TEXT(x) FASTFLOW_TEXT_OF(x)

namespace fastflow {
namespace {

template <class Program>
using Called = typename CalledWith<Program>::Type;

template <class Program, int PHASE>
__device__ __forceinline__ void run_phases(const Called<Program>& call, int64_t round,
                                           typename Program::Shared& shared) {
  Program::template phase<PHASE>(call, blockIdx.x, threadIdx.x, round, shared);
  if constexpr (PHASE + 1 < Program::PHASES) {
    if (PHASE == 0 && Program::ends(call)) return;
    if constexpr (PHASE + 1 <= Program::FIRST_OF_ONE_WARP)
      __syncthreads();
    else
      __syncwarp();
    if (PHASE + 1 == Program::FIRST_OF_ONE_WARP && threadIdx.x >= 32) return;
    run_phases<Program, PHASE + 1>(call, round, shared);
  }
}

// A kernel may start before the one that it reads from has ended, and waits for it here.
template <class Program>
__global__ void __launch_bounds__(THREADS, Program::BLOCKS) kernel(const __grid_constant__ Called<Program> call) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  __shared__ typename Program::Shared shared;
  const int64_t rounds = Program::rounds(call, blockIdx.x);
  run_phases<Program, 0>(call, 0, shared);
  for (int64_t round = 1; round < rounds; ++round) {
    __syncthreads();
    run_phases<Program, 0>(call, round, shared);
  }
}

// Whether the code that a device runs holds the wait above: 1 or -1, 0 before anybody asked.
bool waits(int device) {
  constexpr int DEVICES = 64;
  static std::atomic<int> known[DEVICES];
  if (device < 0 || device >= DEVICES) return false;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaFuncAttributes attributes;
    const bool read = cudaFuncGetAttributes(&attributes, kernel<FinishRows<SCORES>>) == cudaSuccess;
    answer = read && attributes.ptxVersion >= 90 ? 1 : -1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer > 0;
}

// Kernels of one call, on one stream; those after the first overlap their launch with the end of the one before.
class Launcher {
 public:
  explicit Launcher(Stream stream) : stream_(stream) {}

  template <class Program>
  int run(const Called<Program>& call, int64_t blocks) {
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(THREADS);
    config.stream = static_cast<cudaStream_t>(stream_.handle);
    config.attrs = &overlap;
    config.numAttrs = later_ && waits(stream_.device) ? 1 : 0;
    later_ = true;
    return cudaLaunchKernelEx(&config, kernel<Program>, call);
  }

 private:
  Stream stream_;
  bool later_ = false;
};

// Makes a device the current one, and what it was again.
class Current {
 public:
  explicit Current(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  int error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
  bool changed_ = false;
};

}  // namespace

int64_t scratch_words_of(bool backward, int64_t batch, int64_t numel, int64_t groups, bool clamp, bool means) {
  return scratch_words(backward, batch, numel, groups, clamp, means);
}

int64_t matching_words_of(int64_t batch, int64_t numel) { return matching_words(batch, numel); }

int step_on(const Call& call, float* scratch, Stream stream) {
  const Current current(stream.device);
  Launcher launcher(stream);
  return current.error() ? current.error() : run_step(call, scratch, launcher);
}

int log_prob_backward_on(const Call& call, float* scratch, Stream stream) {
  const Current current(stream.device);
  Launcher launcher(stream);
  return current.error() ? current.error() : run_log_prob_backward(call, scratch, launcher);
}

int matching_on(const Call& call, float* scratch, Stream stream) {
  const Current current(stream.device);
  Launcher launcher(stream);
  return current.error() ? current.error() : run_matching(call, scratch, launcher);
}

int matching_backward_on(const Call& call, float* scratch, Stream stream) {
  const Current current(stream.device);
  Launcher launcher(stream);
  return current.error() ? current.error() : run_matching_backward(call, scratch, launcher);
}

int policy_rows_on(const PolicyCall& call, Stream stream) {
  const Current current(stream.device);
  Launcher launcher(stream);
  return current.error() ? current.error() : launcher.run<PolicyRows>(call, 1);
}

int load_on(int device) {
  const Current current(device);
  if (current.error()) return current.error();
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel<FinishRows<SCORES>>);
  cudaGetLastError();  // a failure here is an answer, and leaves no error behind
  return error;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
const char* architectures() { return FASTFLOW_TEXT(FASTFLOW_ARCHS); }

}  // namespace fastflow
